"""Pictures of runs: ratios to the floor, and cost as work grows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

SWEEP_LABELS = {
    'tokens': 'tokens per image (8 images)',
    'experts': 'experts (8 x 1024 tokens)',
    'batch': 'images (197 tokens each)',
    'width': 'width (8 x 197 tokens)',
}
# one colour and marker per contender in all panels, distinguishable without colour
STYLES = {
    'dense': ('black', 'o'),
    'bound': ('tab:gray', 's'),
    'ours': ('tab:blue', '^'),
    'layer': ('tab:orange', 'D'),
    'loop': ('tab:red', 'v'),
}


def draw(run: Mapping[str, Any], path: Path) -> None:
    """Draw a run into a file."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(f"{missing}; --plot needs: pip install '.[bench]'") from None

    rows = run['rows']
    figure = Figure(layout='constrained')
    if any(row.get('sweep') for row in rows):
        _draw_sweeps(figure, [row for row in rows if row['sweep']])
    elif any(_is_discrete(row) for row in rows):
        draw_savings(figure, rows)
    else:
        _draw_ratios(figure, rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _draw_sweeps(figure: Figure, rows: Sequence[Row]) -> None:
    """Time, ratio and memory side by side, a line of panels per sweep and dtype."""
    kinds = list(dict.fromkeys((row['sweep'], row['dtype']) for row in rows))
    figure.set_size_inches(15, 4 * len(kinds))
    panels = figure.subplots(len(kinds), 3, squeeze=False)
    columns = {'median_ms': 'ms per step', 'to_dense': 'time over dense', 'peak_mb': 'peak MB'}
    for line, (sweep, dtype) in zip(panels, kinds, strict=True):
        chosen = [row for row in rows if (row['sweep'], row['dtype']) == (sweep, dtype)]
        for axes, (quantity, label) in zip(line, columns.items(), strict=True):
            _draw_curves(axes, chosen, sweep, quantity)
            axes.set_ylabel(label, fontsize=14)
            axes.set_title(f'{dtype}, {chosen[0]["mode"]}', fontsize=14)


def _draw_curves(axes: Axes, rows: Sequence[Row], sweep: str, quantity: str) -> None:
    for name in dict.fromkeys(row['contender'] for row in rows):
        own = sorted((row for row in rows if row['contender'] == name), key=lambda r: r[sweep])
        sizes, values = [row[sweep] for row in own], [row[quantity] for row in own]
        colour, marker = STYLES.get(name, (None, 'x'))
        axes.plot(sizes, values, label=name, color=colour, marker=marker, linewidth=2)
    ticks = sorted({row[sweep] for row in rows})
    axes.set_xscale('log', base=2)
    if quantity != 'to_dense':
        axes.set_yscale('log')
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlabel(SWEEP_LABELS[sweep], fontsize=14)
    axes.tick_params(labelsize=12)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=12)


def _is_discrete(row: Row) -> bool:
    """Whether a row is the discrete form of its baseline."""
    return (
        row.get('baseline') is not None and row['contender'] == f'{row["baseline"]},form=discrete'
    )


def draw_savings(figure: Figure, rows: Sequence[Row]) -> None:
    """What discrete forms save of their full ones, a panel per model and a group per MoE blocks."""
    work = {(row['contender'], row['batch'], row['mode']): row['macs'] for row in rows}
    saved: dict[str, dict[str, dict[str, float]]] = {}  # by model, kind, and blocks
    for row in filter(_is_discrete, rows):
        model, *options = row['baseline'].split(',')
        blocks = next(option for option in options if option.startswith('moe_layers='))
        of_model = saved.setdefault(model, {})
        full = work[row['baseline'], row['batch'], row['mode']]
        of_model.setdefault('MACs', {})[blocks] = 1 - row['macs'] / full
        kind = f'{row["mode"]}, batch {row["batch"]}'
        of_model.setdefault(kind, {})[blocks] = 1 - row['to_baseline']
    figure.set_size_inches(5 * len(saved), 5)
    panels = figure.subplots(1, len(saved), sharey=True, squeeze=False)[0]
    for axes, (model, kinds) in zip(panels, saved.items(), strict=True):
        for number, (kind, values) in enumerate(kinds.items()):
            places = [place + 0.2 * number for place in range(len(values))]
            axes.bar(places, [100 * v for v in values.values()], 0.2, label=kind)
        blocks = [name.partition('=')[2] for name in next(iter(kinds.values()))]
        axes.set_xticks([place + 0.3 for place in range(len(blocks))], blocks)
        axes.axhline(28, color='black', linestyle='--', linewidth=1)
        axes.set_title(model, fontsize=14)
        axes.set_xlabel('blocks with experts', fontsize=14)
        axes.tick_params(labelsize=12)
        axes.grid(alpha=0.3, axis='y')
    panels[0].set_ylabel('saved by the discrete form, %', fontsize=14)
    panels[0].annotate("28 %, the paper's", (0, 29), fontsize=12)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=4, frameon=False, fontsize=12)


def _draw_ratios(figure: Figure, rows: Sequence[Row]) -> None:
    """Bars of the time over dense or the baseline, a panel per configuration; peers are orange."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(_configuration(row), []).append(row)
    tallest = max(len(group) for group in groups.values())
    figure.set_size_inches(11, len(groups) * (1.2 + 0.4 * tallest))
    panels = figure.subplots(len(groups), 1, squeeze=False)[:, 0]
    for axes, (title, group) in zip(panels, groups.items(), strict=True):
        reference = 'to_dense' if 'to_dense' in group[0] else 'to_baseline'
        values = [row[reference] for row in group]
        # peers stand out from what they are compared with
        colours = ['tab:orange' if row.get('equal_to') else 'tab:blue' for row in group]
        bars = axes.barh([row['contender'] for row in group], values, color=colours)
        axes.bar_label(bars, fmt='%.2f', fontsize=12, padding=3)
        axes.axvline(1, color='black', linewidth=1)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.tick_params(labelsize=12)
        axes.set_xlabel(f'time over {reference.removeprefix("to_")}', fontsize=14)
        axes.set_title(title, fontsize=14)


def _configuration(row: Row) -> str:
    amp = ' amp' if row['amp'] else ''
    shape = f'{row["batch"]} x {row["tokens"]} tokens'
    if 'experts' in row:
        shape += f', width {row["width"]}, {row["experts"]} experts, top-{row["top_k"]}'
        shape += f', skew {row["skew"]:g}'
    return f'{shape}, {row["dtype"]}{amp}, {row["mode"]}'
