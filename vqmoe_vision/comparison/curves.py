"""Learning curves of a comparison, a band for each row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .controls import is_started
from .results import Usable, images_seen
from .spec import STARTED, Comparison
from .statistics import mean_and_deviation

Curve = list[list[float]]  # iterations and values
# Lines of a row, and of the same one from a checkpoint: of ten colours, of ten more, and so on.
_STYLES = (
    ('-', '--'),
    (':', '-.'),
    ((0, (1, 4)), (0, (6, 2, 1, 2, 1, 2))),
    ((0, (12, 3)), (0, (12, 3, 1, 3))),
    ((0, (20, 2)), (0, (20, 2, 1, 2, 1, 2))),
)
_OTHERS: dict[str, Any] = {'color': '0.8', 'linestyle': '-', 'linewidth': 0.8}
_COLOURS = colormaps['tab10'].colors  # type: ignore[attr-defined]


def plot_curves(comparison: Comparison, usable: Usable) -> Figure:
    """Draws loss, held-out metric and its paired difference: means and deviations over seeds."""
    figure = Figure(figsize=(15, 10), layout='constrained')
    metric, reference = comparison.metric, comparison.reference
    titles = {
        'training loss, auxiliary losses included': 'iteration',
        f'{metric}, held out': 'iteration',
        f'the same, difference to {reference}': 'iteration',
        'the same over the compute of the run': 'images seen times MACs per image, in 1e12',
    }
    axes = list(figure.subplots(2, 2).flat)
    styles = _styles(comparison)
    finished = {row for row, _ in usable}
    others = [row for row in comparison.rows if row in finished and row not in styles]
    for row in (*others, *styles):
        curves = _curves(row, reference, usable)
        for panel, of_panel in zip(axes, curves, strict=True):
            # without those that have no validation at the iterations of the reference
            if not (drawn := [curve for curve in of_panel if curve]):
                continue
            if row in styles:
                _draw(panel, row, styles[row], drawn)
            else:
                _draw_behind(panel, row, drawn)
    for panel, (title, label) in zip(axes, titles.items(), strict=True):
        panel.set(title=title, xlabel=label)
        panel.grid(alpha=0.3)
    _scale_losses(axes[0])
    handles, labels = axes[0].get_legend_handles_labels()
    if others:
        handles.append(Line2D([], [], **_OTHERS))
        labels.append(f'other rows: {len(others)}')
    # inches of a name: 0.08 for a letter, and 0.6 for its line and the gaps
    columns = int(figure.get_figwidth() / (0.08 * max(map(len, labels)) + 0.6))
    figure.legend(handles, labels, loc='outside lower center', ncols=columns, frameon=False)
    figure.suptitle(f'{comparison.name}: mean and standard deviation over seeds')
    return figure


def _curves(row: str, reference: str, usable: Usable) -> tuple[list[Curve], ...]:
    """Of each seed, for the panels in their order."""
    of_row = {seed: content for (name, seed), content in usable.items() if name == row}
    return (
        [content['training_loss'] for content in of_row.values()],
        [content['held_out'] for content in of_row.values()],
        [
            _minus(content['held_out'], usable[reference, seed]['held_out'])
            for seed, content in of_row.items()
            if (reference, seed) in usable
        ],
        [
            [
                [images_seen(content, step) * content['macs'] / 1e12, value]
                for step, value in content['held_out']
            ]
            for content in of_row.values()
        ],
    )


def _scale_losses(axes: Axes) -> None:
    """By factors: a method whose routers learn first has several times the loss of the others."""
    axes.set_yscale('log', subs=[1, 1.25, 1.5, 2, 3, 4, 6, 8])
    axes.yaxis.set_major_formatter('{x:g}')
    axes.yaxis.set_minor_formatter('{x:g}')
    axes.grid(alpha=0.3, which='both')


def _minus(curve: Curve, other: Curve) -> Curve:
    """Of the points that both have."""
    values = {step: value for step, value in other}
    return [[step, value - values[step]] for step, value in curve if step in values]


def colour_of(number: int) -> tuple[float, float, float]:
    """Colour of the curve with that number."""
    return _COLOURS[number % len(_COLOURS)]


def marker_of(number: int, first: str = 'o') -> str:
    """Marker of the points with that number, which tells them from others of their colour."""
    markers = (first, 's', '^', 'D')
    return markers[number // len(_COLOURS) % len(markers)]


def _styles(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """Colour and line of each row that has them; one from a checkpoint has its row's colour."""
    names: dict[str, int] = {}
    styles = {}
    for row in comparison.highlighted or comparison.rows:
        number = names.setdefault(row.removesuffix(STARTED), len(names))
        of_ten = _STYLES[number // len(_COLOURS) % len(_STYLES)]
        style = of_ten[is_started(comparison, row)]
        styles[row] = {'color': colour_of(number), 'linestyle': style}
    return styles


def _draw(axes: Axes, row: str, style: dict[str, Any], curves: Iterable[Curve]) -> None:
    steps, mean, deviation, seeds = _mean(curves)
    label = f'{row} ({seeds})'
    axes.plot(steps, mean, label=label, marker=_marker(steps), markersize=3, **style)
    axes.fill_between(
        steps, mean - deviation, mean + deviation, color=style['color'], alpha=0.15, lw=0
    )


def _draw_behind(axes: Axes, row: str, curves: Iterable[Curve]) -> None:
    steps, mean, _, _ = _mean(curves)
    # matplotlib's legend leaves out what begins with an underscore
    axes.plot(steps, mean, label=f'_{row}', marker=_marker(steps), markersize=1.5, **_OTHERS)


def _mean(curves: Iterable[Curve]) -> tuple[list[float], np.ndarray, np.ndarray, int]:
    """Iterations, mean and deviation at each, and how many curves reach the last."""
    points: dict[float, list[float]] = {}
    for curve in curves:
        # once: runs that were resumed before saves said what was validated have a point twice
        for step, value in {step: value for step, value in curve}.items():
            points.setdefault(step, []).append(value)
    steps = sorted(points)
    mean, deviation = np.transpose([mean_and_deviation(points[step]) for step in steps])
    return steps, mean, deviation, len(points[steps[-1]])


def _marker(steps: Sequence[float]) -> str | None:
    return 'o' if len(steps) < 15 else None  # a point alone would be invisible
