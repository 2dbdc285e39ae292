"""Figures of comparisons: differences with their intervals, learning curves, and a forest."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from vqmoe_vision.models.create import STARTS

from .spec import STARTED, Comparison
from .statistics import Difference
from .store import Usable

TOGETHER = 'together'  # in place of a comparison's name
PREDICTED = 'predicted_low', 'predicted_high'  # of the line of that name
# Lines of a row, and of the same one from a checkpoint: of ten colours, of ten more, and so on.
_STYLES = (
    ('-', '--'),
    (':', '-.'),
    ((0, (1, 4)), (0, (6, 2, 1, 2, 1, 2))),
    ((0, (12, 3)), (0, (12, 3, 1, 3))),
    ((0, (20, 2)), (0, (20, 2, 1, 2, 1, 2))),
    ((0, (2, 8)), (0, (2, 2, 2, 8))),
)
_OTHERS: dict[str, Any] = {'color': '0.8', 'linestyle': '-', 'linewidth': 0.8}
_COLOURS = colormaps['tab10'].colors  # type: ignore[attr-defined]


def colour_of(number: int) -> tuple[float, float, float]:
    """Colour of the curve with that number."""
    return _COLOURS[number % len(_COLOURS)]


def marker_of(number: int) -> str:
    """Marker of the points with that number, which tells them from others of their colour."""
    return 'os^D'[number // len(_COLOURS) % 4]


def plot_differences(
    comparison: Comparison, tests: Mapping[str, Mapping[str, Difference]]
) -> Figure | None:
    """Draws each row's differences to the reference: a point per seed, and the mean's interval."""
    told = {row for differences in tests.values() for row, d in differences.items() if d.pairs}
    rows = [row for row in comparison.rows if row in told]
    if not rows:
        return None
    columns, lines = min(len(tests), 2), -(-len(tests) // 2)
    size = 4 + 4 * columns, lines * (1.6 + 0.45 * len(rows))
    figure = Figure(figsize=size, layout='constrained')
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True).flat
    for axes, (title, differences) in zip(grid, tests.items(), strict=False):
        axes.axvline(0, color='black', linewidth=0.8)
        axes.grid(alpha=0.3)
        for place, row in enumerate(rows):
            if found := differences.get(row):
                points = [*found.each.values()], [place] * found.pairs
                axes.plot(*points, 'o', color='C0', alpha=0.6)
            if found and found.freedom > 1:  # the interval of two alone hides everything else
                ends = [[found.mean - found.low], [found.high - found.mean]]
                axes.errorbar(found.mean, place, xerr=ends, fmt='|', color='C1', capsize=4, lw=2)
        axes.set(title=title, xlabel=f'{comparison.metric}, difference to {comparison.reference}')
    for axes in figure.axes[len(tests) :]:
        axes.set_visible(False)
    # the first row is on top
    figure.axes[0].set(yticks=range(len(rows)), yticklabels=rows, ylim=(len(rows) - 0.5, -0.5))
    figure.suptitle(f'{comparison.name}: a point per seed; bars are 95 % intervals of the mean')
    return figure


def plot_curves(comparison: Comparison, usable: Usable) -> Figure:
    """Draws the held-out metric over iterations and over compute: mean and deviation over seeds."""
    figure = Figure(figsize=(15, 6), layout='constrained')
    over_iterations, over_compute = figure.subplots(1, 2, sharey=True)
    over_iterations.set(xlabel='iteration', ylabel=f'{comparison.metric}, held out')
    over_compute.set(xlabel='images seen times MACs per image, in 1e12')
    styles = curve_styles(comparison)
    finished = {row for row, _ in usable}
    others = [row for row in comparison.rows if row in finished and row not in styles]
    for axes, scale in {
        over_iterations: lambda content: 1,
        over_compute: lambda c: c['macs'] * c['images'] / c['iterations'] / 1e12,
    }.items():
        axes.grid(alpha=0.3)
        for row in (*others, *styles):
            curves = [  # a resumed run may have recorded a step twice
                {scale(content) * step: value for step, value in content['held_out']}
                for (name, _), content in usable.items()
                if name == row
            ]
            if any(curves):
                _draw(axes, row, styles.get(row), curves)
    handles, labels = over_iterations.get_legend_handles_labels()
    if others:
        handles.append(Line2D([], [], **_OTHERS))
        labels.append(f'other rows: {len(others)}')
    # inches of a name: 0.08 for a letter, and 0.6 for its line and the gaps
    columns = int(figure.get_figwidth() / (0.08 * max(map(len, labels), default=1) + 0.6))
    figure.legend(handles, labels, loc='outside lower center', ncols=columns, frameon=False)
    figure.suptitle(f'{comparison.name}: mean and standard deviation over seeds')
    return figure


def curve_styles(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """Colour and line of each row that has them; one from a checkpoint has its row's colour."""
    names, styles = dict[str, int](), {}
    for row in comparison.highlighted or comparison.rows:
        number = names.setdefault(row.removesuffix(STARTED), len(names))
        named = {option.partition('=')[0].rpartition('.')[2] for option in comparison.rows[row]}
        style = _STYLES[number // len(_COLOURS) % len(_STYLES)][not named.isdisjoint(STARTS)]
        styles[row] = {'color': colour_of(number), 'linestyle': style}
    return styles


def _draw(
    axes: Axes, row: str, style: dict[str, Any] | None, curves: Sequence[Mapping[float, float]]
) -> None:
    values = pd.DataFrame(curves).sort_index(axis=1)
    mean, deviation, steps = values.mean(), values.std().fillna(0), values.columns
    marker = 'o' if len(steps) < 15 else None  # a point alone would be invisible
    if style is None:  # matplotlib's legend leaves out what begins with an underscore
        axes.plot(steps, mean, label=f'_{row}', marker=marker, markersize=1.5, **_OTHERS)
        return
    label = f'{row} ({values[steps[-1]].count()})'
    axes.plot(steps, mean, label=label, marker=marker, markersize=3, **style)
    band = {'color': style['color'], 'alpha': 0.15, 'lw': 0}
    axes.fill_between(steps, mean - deviation, mean + deviation, **band)


def plot_forest(frame: pd.DataFrame, margin: float | None) -> Figure:
    """Draws contrasts of `forest`, a panel each, with what they say together as a diamond.

    The line through a diamond is where the difference of another comparison is expected.
    """
    panels = dict(tuple(frame.groupby('contrast', sort=False)))
    names = [name for name in dict.fromkeys(frame['comparison']) if name != TOGETHER]
    size = 1.5 + 3.4 * len(panels), 1.8 + 0.35 * len(names)
    figure = Figure(figsize=size, layout='constrained')
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (contrast, lines) in zip(grid, panels.items(), strict=True):
        axes.axvline(0, color='black', linewidth=0.8)
        if margin is not None:
            axes.axvspan(-margin, margin, color='0.9', zorder=0)
        title = contrast
        for _, name, middle, low, high, *predicted, share in lines.itertuples(index=False):
            place = [*names, TOGETHER].index(name)
            if name == TOGETHER:
                axes.plot(predicted, [place, place], color='0.4', linewidth=1.5)
                axes.fill([low, middle, high, middle], np.add([0, -0.25, 0, 0.25], place), 'k')
                title = f'{contrast}\nI² = {share:.0%}'
            else:
                ends = [[middle - low], [high - middle]]
                axes.errorbar(middle, place, xerr=ends, fmt='o', color='C0', capsize=3)
        axes.set(title=title, xlabel='difference (95 % interval)')
    ticks = {'yticks': range(len(names) + 1), 'yticklabels': [*names, TOGETHER]}
    grid[0].set(**ticks, ylim=(len(names) + 0.5, -0.5))
    return figure
