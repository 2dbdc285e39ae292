"""A picture of how the routing of each row behaves, from what `routing` left in the rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .curves import colour_of
from .results import Results
from .routing import by_decider, kept
from .spec import Comparison

Points = dict[str, list[list[float]]]  # by label: of each seed, values over checkpoints


def plot_routing(comparison: Comparison, results: Results) -> Figure | None:
    """Draws what stays of the routing while a model trains and under shifts, and what collapses.

    Args:
        comparison: What was compared.
        results: What is there of it.

    Returns:
        Four panels; None if no run was measured.
    """
    found: list[tuple[str, dict[str, Any]]] = [
        (row, content['routing'])
        for row in comparison.rows
        for (name, _), content in results.usable.items()
        if name == row and content.get('routing')
    ]
    if not found:
        return None
    figure = Figure(figsize=(13, 9.5), layout='constrained')
    training, shifted, rank, parts = figure.subplots(2, 2).flat
    _training(training, found)
    _shifted(shifted, found)
    _rank(rank, found)
    _parts(parts, found)
    handles, labels = training.get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=4, frameon=False)
    figure.suptitle(f'{comparison.name}: routing, means and standard deviations over seeds')
    return figure


def _training(axes: Axes, found: list[tuple[str, dict[str, Any]]]) -> None:
    curves: Points = {}
    for row, routing in found:
        for decider in by_decider(routing):
            kept_then = [kept(routing, decider, changes) for changes in routing['changes']]
            if kept_then:
                curves.setdefault(f'{row}, {decider}', []).append(kept_then)
    for number, (label, values) in enumerate(curves.items()):
        values = _of_equal_length(values)
        mean, std = np.mean(values, axis=0), np.std(values, axis=0)
        steps = range(1, len(mean) + 1)
        line = axes.errorbar(steps, mean, std, label=label, color=colour_of(number), capsize=2)
        line[0].set_marker('o')
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(
        title='experts that stay from one checkpoint to the next',
        xlabel='checkpoint before',
        ylabel='share of patches beyond chance',
    )
    axes.grid(alpha=0.3)


def _shifted(axes: Axes, found: list[tuple[str, dict[str, Any]]]) -> None:
    values: dict[str, list[tuple[float, float]]] = {}
    for row, routing in found:
        for decider, numbers in by_decider(routing).items():
            pair = numbers['kept when mirrored'], numbers['kept when corrupted']
            values.setdefault(f'{row}, {decider}', []).append(pair)
    for number, (label, pairs) in enumerate(values.items()):
        axes.scatter(*zip(*pairs, strict=True), label=label, color=colour_of(number))
    axes.set(
        title='experts that stay when the picture changes, a point per seed',
        xlabel='mirrored: share beyond chance',
        ylabel='corrupted: share beyond chance',
    )
    axes.grid(alpha=0.3)


def _rank(axes: Axes, found: list[tuple[str, dict[str, Any]]]) -> None:
    rows = list(dict.fromkeys(row for row, _ in found))
    for row, routing in found:
        for place, layer in enumerate(routing['layers'].values()):
            share = layer['effective_rank_after'] / layer['effective_rank_before']
            axes.scatter(rows.index(row) + 0.15 * place, share, color=f'C{place}')
    axes.set_xticks(range(len(rows)), rows, rotation=30, ha='right')
    axes.set(
        title="effective rank of a layer's answer over that of its tokens (colour: layer)",
        ylabel='after / before',
    )
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def _parts(axes: Axes, found: list[tuple[str, dict[str, Any]]]) -> None:
    curves: Points = {}
    for row, routing in found:
        by_part: dict[str, list[list[float]]] = {}
        for name, values in routing['convergence'].items():
            by_part.setdefault(name.rpartition('.')[2], []).append(values['distance'])
        for part, layers in by_part.items():
            curves.setdefault(f'{row}, {part}', []).append(np.mean(layers, axis=0).tolist())
    styles = {'experts': '-', 'router': '--', 'quantizer': ':'}
    for number, (label, values) in enumerate(curves.items()):
        part = label.rpartition(' ')[2]
        if part in styles:
            mean = np.mean(_of_equal_length(values), axis=0)
            axes.plot(
                range(1, len(mean) + 1), mean, styles[part], label=label, color=colour_of(number)
            )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(
        title='way that is left to the last checkpoint',
        xlabel='checkpoint',
        ylabel='share of the way since the first',
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize='small')


def _of_equal_length(curves: list[list[float]]) -> list[list[float]]:
    """The curves of the runs that have kept the most checkpoints."""
    most = max(map(len, curves))
    return [curve for curve in curves if len(curve) == most]
