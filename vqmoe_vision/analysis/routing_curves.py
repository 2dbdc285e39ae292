"""Routing over training, from the lines of `routing.jsonl`.

Needs matplotlib (extra `train`).
"""

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .drawing import WIDTH, Picture, panels, percent, short, styled
from .pictures import expert_colours
from .report_tables import Convergence

History = Sequence[dict[str, Any]]


def curve_pictures(history: History) -> list[Picture]:
    """Load of each expert, use of each code, and movement of weights, over the iterations."""
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
def convergence_picture(convergence: Convergence) -> Picture:
    """What is left of the way to the last checkpoint, a panel per layer and a line per part."""
    layers: dict[str, list[str]] = {}
    for part in convergence.parts:
        layers.setdefault(part.rpartition('.')[0], []).append(part)
    figure, grid = _panels(len(layers))
    for axes, (layer, parts) in zip(grid.flat, layers.items(), strict=False):
        for number, part in enumerate(parts):
            name, left = part.rpartition('.')[2], convergence.left(part)
            axes.plot(range(1, len(left) + 1), left, _style(number), label=name, color=f'C{number}')
        axes.set(title=short(layer), xlabel='checkpoint')
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    grid[0, 0].set_ylabel('share of the way left')
    grid[0, 0].set_ylim(bottom=0)
    _legend(figure, grid)
    title = 'Way that is left to the last checkpoint'
    figure.suptitle(title)
    first, second = convergence.checkpoints[:2]
    alt = f'From {first} to {second} what is left falls from 1 to ' + '; '.join(
        f'{convergence.left(part)[1]:.2f} for {short(part)}' for part in convergence.parts
    )
    return Picture('convergence', title, f'{alt}.', figure)


@styled
def _grid(
    kind: str,
    title: str,
    layers: dict[str, list[tuple[int, Any]]],
    said: Callable[[str, list[tuple[int, Any]]], str],
) -> Picture:
    figure, grid = _panels(len(layers))
    for axes, (name, lines) in zip(grid.flat, layers.items(), strict=False):
        (_changes if kind == 'change' else _shares)(axes, lines, kind)
        axes.set(title=short(name), xlabel='iteration')
    # of all panels, once all of them are drawn: a limit that is set leaves later lines outside
    grid[0, 0].set_ylabel('|new - old| / |new|' if kind == 'change' else 'share')
    if kind != 'change':
        grid[0, 0].set_ylim(bottom=0)
    _legend(figure, grid)
    figure.suptitle(title)
    alt = ' '.join(said(name, lines) for name, lines in layers.items())
    return Picture(f'training-{kind}', title, alt, figure)


def _panels(count: int) -> tuple[Figure, Any]:
    return panels(count, WIDTH, 3, room=1.6, sharex=True)


def _legend(figure: Figure, grid: Any) -> None:
    names = {line.get_label(): line for axes in grid.flat for line in axes.get_lines()}
    if len(names) <= 20:
        figure.legend(
            handles=list(names.values()), loc='outside lower center', ncols=4, frameon=False
        )


def _style(number: int) -> str:
    return ('-', '--', ':', '-.')[number % 4]


def _shares(axes: Axes, lines: list[tuple[int, list[float]]], kind: str) -> None:
    iterations = [at for at, _ in lines]
    word = 'expert' if kind == 'load' else 'code'
    colours = expert_colours(len(lines[0][1])).tolist()
    for number, values in enumerate(zip(*(shares for _, shares in lines), strict=True)):
        axes.plot(iterations, values, label=f'{word} {number}', color=colours[number])


def _changes(axes: Axes, lines: list[tuple[int, dict[str, float]]], kind: str) -> None:
    parts = sorted(lines[0][1])
    for number, part in enumerate(parts):
        points = [(at, change[part]) for at, change in lines if change[part] > 0]
        if points:  # a part that is frozen has none, and zero has no place on this axis
            axes.plot(*zip(*points, strict=True), _style(number), label=part, color=f'C{number}')
    axes.set_yscale('log')


def _load_in_words(name: str, lines: list[tuple[int, list[float]]]) -> str:
    (first, start), (last, end) = lines[0], lines[-1]
    at, most = max(lines, key=lambda line: max(line[1]))
    return (
        f'{name}: the largest share is {percent(max(start))} at iteration {first} and '
        f'{percent(max(end))} at {last}, and was {percent(max(most))} at {at}; the smallest is '
        f'{percent(min(start))} and {percent(min(end))}.'
    )


def _change_in_words(name: str, lines: list[tuple[int, dict[str, float]]]) -> str:
    (first, start), (last, end) = lines[0], lines[-1]
    parts = [f'{part} from {start[part]:.2g} to {end[part]:.2g}' for part in end]
    return f'{name}, iterations {first} to {last}: {"; ".join(parts)}.'
