"""Routing over training, from the lines of `routing.jsonl`.

Needs matplotlib (extra `train`).
"""

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .drawing import WIDTH, Picture, percent, short, styled
from .pictures import expert_colours

History = Sequence[dict[str, Any]]


def curve_pictures(history: History) -> list[Picture]:
    """Load of each expert, use of each code, and movement of weights, over the iterations.

    Args:
        history: Lines of `routing.jsonl`, oldest first.
    """
    layers: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for line in history:
        for name, recorded in line['layers'].items():
            layers.setdefault(name, []).append((line['iteration'], recorded))
    drawn = []
    for kind, title, said in (
        ('load', 'Load per expert over training', _load_in_words),
        ('code_usage', 'Share of tokens per code over training', _load_in_words),
        ('change', 'Movement of weights from one record to the next', _change_in_words),
    ):
        of_kind = {
            name: [(at, recorded[kind]) for at, recorded in lines if recorded.get(kind)]
            for name, lines in layers.items()
        }
        of_kind = {name: lines for name, lines in of_kind.items() if lines}
        if of_kind:
            drawn.append(_grid(kind, title, of_kind, said))
    return drawn


@styled
def _grid(
    kind: str,
    title: str,
    layers: dict[str, list[tuple[int, Any]]],
    said: Callable[[str, list[tuple[int, Any]]], str],
) -> Picture:
    columns = min(len(layers), 2)
    rows = -(-len(layers) // columns)
    figure = Figure(figsize=(WIDTH, 3 * rows + 1.6), layout='constrained')
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    names: dict[str, Any] = {}
    for axes, (name, lines) in zip(grid.flat, layers.items(), strict=False):
        (_changes if kind == 'change' else _shares)(axes, lines, kind)
        axes.set(title=short(name), xlabel='iteration')
        axes.grid(alpha=0.3)
        names |= {h.get_label(): h for h in axes.get_lines()}
    for axes in list(grid.flat)[len(layers) :]:
        axes.set_visible(False)
    grid[0, 0].set_ylabel('|new - old| / |new|' if kind == 'change' else 'share')
    if len(names) <= 20:
        figure.legend(
            handles=list(names.values()), loc='outside lower center', ncols=4, frameon=False
        )
    figure.suptitle(title)
    alt = ' '.join(said(name, lines) for name, lines in layers.items())
    return Picture(f'training-{kind}', title, alt, figure)


def _shares(axes: Axes, lines: list[tuple[int, list[float]]], kind: str) -> None:
    iterations = [at for at, _ in lines]
    word = 'expert' if kind == 'load' else 'code'
    colours = expert_colours(len(lines[0][1])).tolist()
    for number, values in enumerate(zip(*(shares for _, shares in lines), strict=True)):
        axes.plot(iterations, values, label=f'{word} {number}', color=colours[number])
    axes.set_ylim(bottom=0)


def _changes(axes: Axes, lines: list[tuple[int, dict[str, float]]], kind: str) -> None:
    parts = sorted(lines[0][1])
    for number, part in enumerate(parts):
        points = [(at, change[part]) for at, change in lines if change[part] > 0]
        if points:  # a part that is frozen has none, and zero has no place on this axis
            style = ('-', '--', ':', '-.')[number % 4]
            axes.plot(*zip(*points, strict=True), style, label=part, color=f'C{number}')
    axes.set_yscale('log')


def _load_in_words(name: str, lines: list[tuple[int, list[float]]]) -> str:
    (first, start), (last, end) = lines[0], lines[-1]
    return (
        f'{name}: the largest share is {percent(max(start))} at iteration {first} and '
        f'{percent(max(end))} at {last}; the smallest {percent(min(start))} and '
        f'{percent(min(end))}.'
    )


def _change_in_words(name: str, lines: list[tuple[int, dict[str, float]]]) -> str:
    (first, start), (last, end) = lines[0], lines[-1]
    parts = [f'{part} from {start[part]:.2g} to {end[part]:.2g}' for part in end]
    return f'{name}, iterations {first} to {last}: {"; ".join(parts)}.'
