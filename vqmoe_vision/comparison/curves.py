"""Learning curves of a comparison, a band for each row."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .results import Usable
from .spec import Comparison

_STYLES = ('-', '--', ':')
_COLOURS = colormaps['tab10'].colors  # type: ignore[attr-defined]


def plot_curves(comparison: Comparison, usable: Usable) -> Figure:
    """Draws the training loss and the metric on held-out images against iterations.

    A line is the mean over the seeds of a row, its band one standard deviation to both sides.

    Args:
        comparison: What was compared.
        usable: As `Results.usable`.
    """
    figure = Figure(figsize=(11, 5.2), layout='constrained')
    panels = {'training_loss': 'training loss', 'held_out': f'{comparison.metric}, held out'}
    for axes, (field, title) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for number, row in enumerate(comparison.rows):
            of_row = [c[field] for (name, _), c in usable.items() if name == row]
            if of_row:
                _draw(axes, row, number, of_row)
        axes.set(title=title, xlabel='iteration')
        axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=6, frameon=False)
    figure.suptitle(f'{comparison.name}: mean and standard deviation over seeds')
    return figure


def _draw(axes: Axes, row: str, number: int, curves: Iterable[list[list[float]]]) -> None:
    points: dict[float, list[float]] = {}
    for curve in curves:
        for step, value in curve:
            points.setdefault(step, []).append(value)
    steps = sorted(points)
    mean = np.array([np.mean(points[step]) for step in steps])
    seeds = len(points[steps[-1]])
    spread = np.array([np.std(points[s], ddof=1) if len(points[s]) > 1 else 0 for s in steps])
    style = {
        'color': _COLOURS[number % len(_COLOURS)],
        'linestyle': _STYLES[number // len(_COLOURS) % len(_STYLES)],
        'marker': 'o' if len(steps) < 15 else None,  # a point alone would be invisible
        'markersize': 3,
    }
    axes.plot(steps, mean, label=f'{row} ({seeds})', **style)
    axes.fill_between(steps, mean - spread, mean + spread, color=style['color'], alpha=0.15, lw=0)
