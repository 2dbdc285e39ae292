"""A picture of what rows score over the reference, with the intervals that the tables have."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vqmoe_vision.analysis.drawing import panels

from .spec import Comparison
from .statistics import Difference


def plot_differences(
    comparison: Comparison, tests: Mapping[str, Mapping[str, Difference]]
) -> Figure | None:
    """Draws each row's differences to the reference: a point per seed, and the mean's interval."""
    found = {row for differences in tests.values() for row, d in differences.items() if d.pairs}
    rows = [row for row in comparison.rows if row in found]
    if not rows:
        return None
    figure, grid = panels(len(tests), 4 + 4 * min(len(tests), 2), 1.6 + 0.45 * len(rows))
    for axes, (title, differences) in zip(grid.flat, tests.items(), strict=False):
        axes.axvline(0, color='black', linewidth=0.8)
        for place, row in enumerate(rows):
            if row in differences:
                _difference(axes, place, differences[row])
        label = f'{comparison.metric}, difference to {comparison.reference}'
        axes.set(title=title, xlabel=label)
    # the first row is on top
    grid[0, 0].set(yticks=range(len(rows)), yticklabels=rows, ylim=(len(rows) - 0.5, -0.5))
    figure.suptitle(f'{comparison.name}: a point per seed; bars are 95 % intervals of the mean')
    return figure


def _difference(axes: Axes, place: int, found: Difference) -> None:
    points = list(found.each.values())
    axes.plot(points, [place] * len(points), 'o', color='C0', alpha=0.6)
    if found.freedom > 1:  # the interval of two alone hides everything else
        ends = [[found.mean - found.low], [found.high - found.mean]]
        axes.errorbar(found.mean, place, xerr=ends, fmt='|', color='C1', capsize=4, lw=2)
