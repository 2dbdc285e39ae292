"""Tables and figures of a comparison, made again from its rows by way of one tidy frame."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd

from vqmoe_vision.engine.checkpoint_files import write_atomically
from vqmoe_vision.engine.cli import make_folder
from vqmoe_vision.engine.escaping import as_markdown, printable
from vqmoe_vision.moe.config import check

from .figures import plot_curves, plot_differences
from .frame import (
    HELD_OUT,
    LAYERS,
    LEFT,
    ROUTING,
    UNEQUAL,
    compared,
    contrasts,
    of_layers,
    scores_of,
    summary,
    tidy,
)
from .measured import SEVERITY, SHIFTED_IMAGES
from .spec import Comparison
from .statistics import Difference, detectable
from .store import SPLITS, Results, data_of

_HELD_OUT = 'the same on validation images'
_OTHERWISE = 'otherwise on validation images'
_IMAGES = 'interval over images'
_BY_NOISE = 'by the noise of the budget'
_ERROR = 'quantization error'
# pandas leaves a caption as it is
_LATEX = str.maketrans({sign: f'\\{sign}' for sign in '%_&#${}'})
_SHIFTED = (
    'The same checkpoints on test images that are changed. A corruption is the mean over the '
    'fifteen of ImageNet-C at that severity. Left is what a checkpoint still has of its own score '
    'on unchanged images; one without any has none.'
)
_ROUTED = (
    'What the routing of the last checkpoints is like on {images} test images; '
    'docs/reference/measures.md defines the measures. "Kept" is the share of tokens whose '
    'expert stays, beyond chance (1: all, 0: as if drawn from the load of the last), from the '
    f'checkpoint before to the last, and, on the first {SHIFTED_IMAGES} of the images, under '
    f'shifts; corruptions are those of ImageNet-C at severity {SEVERITY}.'
)


def shown(
    comparison: Comparison, results: Results, values: pd.DataFrame, frame: pd.DataFrame
) -> pd.DataFrame:
    """The summary as a reader sees it, rounded and with units."""
    planned, seeds = len(comparison.seeds), frame['seeds']
    found, held_out = compared(comparison, values), compared(comparison, values, HELD_OUT)
    unequal = frame.get('unequal_compute', pd.Series(False, frame.index))
    sizes = zip(frame['params'] / 1e6, frame['active_params'] / 1e6, strict=True)
    columns: dict[str, Any] = {
        'row': [f'{row}{"*" if unequal[row] else ""}' for row in frame.index],
        comparison.metric: frame['score'].map(_number),
        'std': frame['std'].map(_number),
        'seeds': [f'{n}' if n == planned else f'{n} of {planned}' for n in seeds],
        _difference_to(comparison): [interval(found.get(row), n) for row, n in seeds.items()],
        _BY_NOISE: map(ends, frame['pooled_low'], frame['pooled_high']),
        'p, one of many': [f'({_p_value(p)})' for p in frame['pooled_p']],
        _HELD_OUT: [interval(held_out.get(row), n) for row, n in seeds.items()],
        _IMAGES: map(ends, frame['images_low'], frame['images_high']),
        'parameters, M: all / active': [f'{all_:.2f} / {active:.2f}' for all_, active in sizes],
        'MACs, M': (frame['macs'] / 1e6).map('{:.1f}'.format),
        'minutes': frame['minutes'].map('{:.1f}'.format),
        **{name.replace('_', ' '): frame[name].map(_layer_cell) for name in LAYERS},
    }
    for name in comparison.also:
        deviations = frame.get(f'{name}_std', pd.Series(math.nan, frame.index))
        columns[name] = map(_mean_cell, frame[name], deviations)
    told = {
        'minutes': len({content['hardware'] for content in results.usable.values()}) == 1,
        _HELD_OUT: 'held_out_difference' in frame,
        _IMAGES: not frame['images_low'].isna().all(),
    }
    return pd.DataFrame({n: list(column) for n, column in columns.items() if told.get(n, True)})


def contrast_table(comparison: Comparison, frame: pd.DataFrame) -> pd.DataFrame:
    """The contrasts as a reader sees them; validation images where they turn sign or finding."""
    table = pd.DataFrame(
        {
            'contrast': name,
            'seeds': f'{line["pairs"]} of {len(comparison.seeds)}',
            'difference (95 % interval)': (
                f'{line["difference"]:+.2f} ({ends(line["low"], line["high"])})'
            ),
            _BY_NOISE: ends(line['pooled_low'], line['pooled_high']),
            'p (Holm)': _p_value(line['p_holm']),
            'p of equality (Holm)': _p_value(line['p_equal_holm']),
            'finding': line['finding'],
            _OTHERWISE: _otherwise(line),
        }
        for name, line in frame.iterrows()
    )
    if not table.empty and (table[_OTHERWISE] == '-').all():
        del table[_OTHERWISE]
    return table


def _otherwise(line: pd.Series) -> str:
    """What a contrast is on validation images, if its sign or its finding is another there."""
    difference = line.get('held_out_difference', math.nan)
    turned = difference * line['difference'] < 0 or line.get('held_out_finding') != line['finding']
    if math.isnan(difference) or not turned:
        return '-'
    bounds = ends(line['held_out_pooled_low'], line['held_out_pooled_high'])
    return f'{difference:+.2f} ({bounds}), {line["held_out_finding"]}'


def _difference_to(comparison: Comparison) -> str:
    return f'difference to {comparison.reference} (95 % interval)'


def _number(value: float) -> str:
    return '-' if math.isnan(value) else f'{value:.2f}'


def _p_value(value: float) -> str:
    return '-' if math.isnan(value) else '<0.001' if value < 0.001 else f'{value:.3f}'


def interval(difference: Difference | None, seeds: int) -> str:
    """Such as '+1.00 (+0.50 to +1.50), 2 pairs'."""
    if difference is None or not (pairs := difference.pairs):
        return '-'
    bounds = f' ({ends(difference.low, difference.high)})' if pairs > 1 else ''
    few = f', {pairs} {"pairs" if pairs > 1 else "pair"}' if pairs != seeds else ''
    return f'{difference.mean:+.2f}{bounds}{few}'


def ends(low: float, high: float) -> str:
    """Such as '+0.50 to +1.50'."""
    return '-' if math.isnan(low) else f'{low:+.2f} to {high:+.2f}'


def _layer_cell(values: Sequence[float]) -> str:
    """A number of each layer; a dash for nan, and for none."""
    return ' / '.join(_number(value).rstrip('0').rstrip('.') for value in values) or '-'


def _mean_cell(value: float | list[float], deviation: float) -> str:
    if isinstance(value, list):
        return _layer_cell(value)
    return _number(value) + ('' if math.isnan(deviation) else f' ± {deviation:.2f}')


def shift_table(comparison: Comparison, values: pd.DataFrame) -> pd.DataFrame:
    """Scores under shifts, for each row and shift that was measured."""
    lines, metric, difference = [], comparison.metric, _difference_to(comparison)
    for shift in comparison.shifts:
        scores, left = scores_of(values, shift, metric), scores_of(values, shift, LEFT)
        own, of_left = (compared(comparison, values, shift, name) for name in (metric, LEFT))
        errors = of_layers(values, shift, 'quantization_error', scores)
        for (row, of_row), layers in zip(scores.items(), errors, strict=True):
            column = pd.Series(of_row)
            lines.append(
                {
                    'shift': shift,
                    'row': row,
                    metric: _number(column.mean()),
                    'std': _number(column.std()),
                    'seeds': str(len(column)),
                    difference: interval(own.get(row), len(column)),
                    LEFT: _number(pd.Series(left.get(row, {}), dtype=float).mean()),
                    f'its {difference}': interval(of_left.get(row), len(column)),
                    _ERROR: _layer_cell(layers),
                }
            )
    none = all(line[_ERROR] == '-' for line in lines)
    return pd.DataFrame(lines).drop(columns=[_ERROR] if lines and none else [])


def routing_table(values: pd.DataFrame) -> pd.DataFrame:
    """Measures as means over layers, with the standard deviation over seeds; a line per decider."""
    of = values[values['split'] == ROUTING]
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for (row, name), each in of.groupby(['row', 'name'], sort=False)['value']:
        decider, _, measure = name.rpartition('/')
        line = lines.setdefault((row, decider), {'row': row, 'decider': as_markdown(decider)})
        line |= {'seeds': str(len(each)), measure: _mean_cell(each.mean(), each.std())}
    return pd.DataFrame([*lines.values()])


def notes(comparison: Comparison, results: Results, frame: pd.DataFrame) -> list[str]:
    """What a reader of the table must know."""
    where = 'of the last checkpoint on the test data'
    if not comparison.tested:
        where = 'at the end of training on held-out data; no test data was seen'
    (noise, freedom), seeds = results.noise, len(comparison.seeds)
    said = [
        f'{comparison.metric} {where}. Differences are paired by seed; intervals and p are those '
        'of single comparisons by t-tests. p of a contrast is corrected by the method of Holm for '
        f'all {len(comparison.contrasts)} contrasts, and given once they have all {seeds} seeds; '
        'other rows have theirs in brackets, uncorrected. Validation images choose no checkpoint. '
        'Other numbers are of the same pass, by layer.'
    ]
    if freedom:
        said.append(
            f'The noise of a difference at one seed is {noise:.2f} by the comparisons of this '
            'budget whose variances agree by an F-test at 5 % '
            f'({freedom} degrees of freedom): {seeds} seeds find a true difference of '
            f'{detectable(noise, seeds, freedom=freedom):.2f} with 80 % power at the 5 % level.'
        )
    if comparison.margin is not None:
        said.append(
            f'Equal are rows whose difference lies within {comparison.margin:g} to both sides, by '
            'two one-sided tests at the 5 % level, corrected by the method of Holm too.'
        )
    if frame.get('unequal_compute', pd.Series(False)).any():
        said.append(
            f'* does not have the compute of {comparison.reference}: multiply-accumulates of an '
            f'image times images seen in training differ by more than {UNEQUAL:.0%}.'
        )
    rows = results.usable.values()
    machines = sorted({as_markdown(content['hardware']) for content in rows})
    kind = 'processor' if (frame['device'] == 'cpu').all() else 'wall-clock'
    if len(machines) > 1:
        said.append(f'Times are left out, because machines differ: {"; ".join(machines)}.')
    else:
        said.append(f'Minutes are {kind} time of training: {machines[0]}.')
    seen = {s: {d: 0 for c in rows for n, d in data_of(c) if n == s} for s in SPLITS}
    if parts := [f'{split} {" and ".join(data)}' for split, data in seen.items() if data]:
        said.append(f'Data: {as_markdown("; ".join(parts))}.')
    if unknown := sum('data' not in content for content in rows):
        said.append(f'Which data they saw is not recorded of {unknown} of {len(rows)} runs.')
    findings = [content['checked'] for content in rows if 'checked' in content]
    right = [as_markdown(finding['commit'] or 'outside git') for finding in findings]
    if not right:
        return [
            *said,
            f'None of the {len(rows)} runs has been checked: `tools/compare.py check` does so.',
        ]
    at = ', '.join(f'{commit} ({n})' for commit, n in sorted(Counter(right).items()))
    line = f'The first losses of {len(right)} of {len(rows)} runs came out again, at {at}.'
    open_ = ', '.join(
        f'{row}-seed{n}' for (row, n), c in results.usable.items() if 'checked' not in c
    )
    return [*said, f'{line} Not checked: {open_}.' if open_ else line]


def write_tables(comparison: Comparison, results: Results, folder: Path) -> list[Path]:
    """Writes the table of a comparison; the same rows give the same bytes."""
    values, rows = tidy(comparison, results), results.usable.values()
    frame = summary(comparison, results, values)
    first = contrast_table(comparison, contrasts(comparison, results, values))
    table, said = shown(comparison, results, values, frame), notes(comparison, results, frame)
    names = {name: printable(name).replace('`', "'") for name in results.left_out}
    left_out = [f'`{names[n]}`: {as_markdown(why)}' for n, why in results.left_out.items()]
    routed = sorted({content['routing']['images'] for content in rows if content.get('routing')})
    told = _ROUTED.format(images=' or '.join(map(str, routed)))
    further = {_SHIFTED: shift_table(comparison, values), told: routing_table(values)}
    commits = as_markdown(', '.join(sorted({content['commit'] for content in rows})))
    parts = [
        f'# {comparison.name}',
        f'Made from the rows by `python tools/compare.py table`; commits {commits}.',
        *(markdown(part) for part in (first, table) if not part.empty),
        _list(said),
        *(f'{text}\n\n{markdown(part)}' for text, part in further.items() if not part.empty),
    ]
    parts += ['Left out:', _list(left_out)] if left_out else []
    if results.missing:
        parts += ['Not run:', _list([', '.join(run.name for run in results.missing)])]
    make_folder(folder)
    files = [folder / f'{comparison.name}.{kind}' for kind in ('md', 'tex', 'csv')]
    caption = ' '.join(said).translate(_LATEX)
    # pandas leaves this sign, and the fonts that LaTeX starts with print another in its place
    latex = table.to_latex(index=False, escape=True, caption=caption).replace('<', r'\textless{}')
    texts = '\n\n'.join(parts), latex, frame.to_csv(index_label='row')
    for file, text in zip(files, texts, strict=True):
        write_atomically(file, f'{text.rstrip()}\n'.encode())
    return files


def markdown(table: pd.DataFrame) -> str:
    """A table of cells that are strings."""
    # numbers are strings already, with the digits that they deserve
    return table.fillna('-').to_markdown(index=False, disable_numparse=True)


def _list(lines: Sequence[str]) -> str:
    # a star at the beginning of a line would begin a list in the list
    return '\n'.join('- ' + (f'\\{line}' if line.startswith('*') else line) for line in lines)


def draw_figures(
    comparison: Comparison, results: Results, folder: Path, images: Path | None = None
) -> list[Path]:
    """Draws the figures of a comparison, and those that documents show; the same from the same."""
    values, written = tidy(comparison, results), []
    own = {'as in training': compared(comparison, values)}
    shifts = {name: compared(comparison, values, name) for name in comparison.shifts}
    figures = {
        'curves': plot_curves(comparison, results.usable),
        'differences': plot_differences(comparison, own),
        'shifts': plot_differences(comparison, {n: of for n, of in shifts.items() if of}),
    }
    files: dict[Path, tuple[str, str | None]] = {
        folder / f'{comparison.name}-{name}.png': (name, None) for name in figures
    }
    if images is not None:
        check(bool(comparison.images), '--images', str(images), 'where a comparison names images')
        make_folder(images)
        drawn_by = f'matplotlib {matplotlib.__version__}'
        for kind, name in comparison.images.items():
            files[images / f'{name}.png'] = kind, drawn_by
    for file, (name, software) in files.items():
        if (figure := figures.get(name)) is not None:
            figure.savefig(file, metadata={'Software': software}, dpi=110)
            written.append(file)
        else:
            drawn = ', '.join(name for name, figure in figures.items() if figure is not None)
            check(software is None, 'images', name, f'one of those drawn, {drawn}')
            file.unlink(missing_ok=True)
    return written
