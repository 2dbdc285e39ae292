"""A picture of what rows score over the reference, with the intervals that the tables have."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vqmoe_vision.analysis.drawing import panels

from .spec import Comparison
from .statistics import paired_difference

Scores = Mapping[str, Mapping[int, float]]  # by row and seed


def plot_differences(comparison: Comparison, tests: Mapping[str, Scores]) -> Figure | None:
    """Draws each row's differences to the reference: a point per seed, and the mean's interval.

    Args:
        comparison: What was compared.
        tests: By title: the scores of a test.

    Returns:
        A panel per test; None if no row has a seed in common with the reference.
    """
    reference = comparison.reference
    rows = [
        row
        for row in comparison.rows
        if row != reference
        and any(s.get(row, {}).keys() & s.get(reference, {}).keys() for s in tests.values())
    ]
    if not rows:
        return None
    figure, grid = panels(len(tests), 4 + 4 * min(len(tests), 2), 1.6 + 0.45 * len(rows))
    for axes, (title, scores) in zip(grid.flat, tests.items(), strict=False):
        _differences(axes, rows, scores, reference)
        axes.set(title=title, xlabel=f'{comparison.metric}, difference to {reference}')
    # the first row is on top
    grid[0, 0].set(yticks=range(len(rows)), yticklabels=rows, ylim=(len(rows) - 0.5, -0.5))
    figure.suptitle(f'{comparison.name}: a point per seed; bars are 95 % intervals of the mean')
    return figure


def _differences(axes: Axes, rows: list[str], scores: Scores, reference: str) -> None:
    base = scores.get(reference, {})
    axes.axvline(0, color='black', linewidth=0.8)
    for place, row in enumerate(rows):
        own = scores.get(row, {})
        points = [own[seed] - base[seed] for seed in sorted(own.keys() & base.keys())]
        axes.plot(points, [place] * len(points), 'o', color='C0', alpha=0.6)
        if len(points) > 2:  # the interval of two hides everything else
            found = paired_difference(own, base)
            ends = [[found.mean - found.low], [found.high - found.mean]]
            axes.errorbar(found.mean, place, xerr=ends, fmt='|', color='C1', capsize=4, lw=2)
