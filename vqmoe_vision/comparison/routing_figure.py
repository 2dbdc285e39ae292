"""Pictures of how the routing of each row behaves, from what `routing` left in the rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .curves import colour_of, marker_of
from .results import Results
from .routing import by_decider, kept
from .spec import Comparison
from .statistics import mean_and_deviation

Points = dict[str, list[list[float]]]  # by label: of each seed, values over checkpoints


def plot_routing(comparison: Comparison, results: Results) -> dict[str, Figure]:
    """Draws what the paper claims of routing, a figure per claim."""
    found: list[tuple[str, dict[str, Any]]] = [
        (row, content['routing'])
        for row in comparison.rows
        for (name, _), content in results.usable.items()
        if name == row and content.get('routing')
    ]
    claims = {'collapse': (_load, _rank), 'inconsistency': (_training, _shifted)}
    figures = {}
    for claim, panels in claims.items() if found else ():
        figures[claim] = Figure(figsize=(13, 5.4), layout='constrained')
        for axes, draw in zip(figures[claim].subplots(1, 2).flat, panels, strict=True):
            draw(axes, found)
            axes.grid(alpha=0.3)
    if any(routing['convergence'] for _, routing in found):
        figures['convergence'] = Figure(figsize=(9, 5.4), layout='constrained')
        _parts(figures['convergence'].subplots(), found)
    for claim, figure in figures.items():
        figure.suptitle(f'{comparison.name}: {claim}')
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc='outside lower center', ncols=4, frameon=False)
    return figures


def _load(axes: Axes, found: list[tuple[str, dict[str, Any]]]) -> None:
    names = list(
        dict.fromkeys(f'{row}, {d}' for row, routing in found for d in by_decider(routing))
    )
    for row, routing in found:
        for decider, numbers in by_decider(routing).items():
            axes.scatter(names.index(f'{row}, {decider}'), numbers['load entropy'], color='C0')
    axes.set_xticks(range(len(names)), names, rotation=30, ha='right')
    axes.set(title='load entropy, a point per seed (1: even, 0: one expert)', ylim=(0, 1.05))


def _training(axes: Axes, found: list[tuple[str, dict[str, Any]]]) -> None:
    curves: Points = {}
    for row, routing in found:
        for decider in by_decider(routing):
            kept_then = [kept(routing, decider, changes) for changes in routing['changes']]
            if kept_then:
                curves.setdefault(f'{row}, {decider}', []).append(kept_then)
    for number, (label, values) in enumerate(curves.items()):
        columns = zip(*_of_equal_length(values), strict=True)
        mean, deviation = zip(*map(mean_and_deviation, columns), strict=True)
        steps = range(1, len(mean) + 1)
        line = axes.errorbar(
            steps, mean, deviation, label=label, color=colour_of(number), capsize=2
        )
        line[0].set_marker(marker_of(number))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(
        title='experts that stay from one checkpoint to the next (mean and deviation)',
        xlabel='checkpoint before',
        ylabel='share of patches beyond chance',
    )


def _shifted(axes: Axes, found: list[tuple[str, dict[str, Any]]]) -> None:
    values: dict[str, list[tuple[float, float]]] = {}
    for row, routing in found:
        for decider, numbers in by_decider(routing).items():
            pair = numbers['kept when mirrored'], numbers['kept when corrupted']
            values.setdefault(f'{row}, {decider}', []).append(pair)
    for number, (label, pairs) in enumerate(values.items()):
        look: dict[str, Any] = {'color': colour_of(number), 'marker': marker_of(number)}
        axes.scatter(*zip(*pairs, strict=True), label=label, **look)
    axes.set(
        title='experts that stay when the picture changes, a point per seed',
        xlabel='mirrored: share beyond chance',
        ylabel='corrupted: share beyond chance',
    )


def _rank(axes: Axes, found: list[tuple[str, dict[str, Any]]]) -> None:
    rows = list(dict.fromkeys(row for row, _ in found))
    layers: dict[str, Any] = {}
    for row, routing in found:
        for place, layer in enumerate(routing['layers'].values()):
            share = layer['effective_rank_after'] / layer['effective_rank_before']
            drawn = axes.scatter(rows.index(row) + 0.15 * place, share, color=f'C{place}')
            layers.setdefault(f'MoE layer {place + 1}', drawn)
    axes.set_xticks(range(len(rows)), rows, rotation=30, ha='right')
    axes.set(
        title='effective rank of what leaves a layer, a point per seed',
        ylabel="over that of the layer's tokens",
        ylim=(0, None),
    )
    axes.legend(layers.values(), layers.keys(), frameon=False)


def _parts(axes: Axes, found: list[tuple[str, dict[str, Any]]]) -> None:
    curves: Points = {}
    for row, routing in found:
        by_part: dict[str, list[list[float]]] = {}
        for name, values in routing['convergence'].items():
            by_part.setdefault(name.rpartition('.')[2], []).append(values['distance'])
        for part, layers in by_part.items():
            curves.setdefault(f'{row}, {part}', []).append(np.mean(layers, axis=0).tolist())
    styles = {'experts': '-', 'router': '--', 'quantizer': ':'}
    numbers: dict[str, int] = {}
    for label, values in curves.items():
        row, _, part = label.rpartition(', ')
        mean = np.mean(_of_equal_length(values), axis=0)
        if part in styles and mean[0] > 0:  # a part that is frozen has no way
            number = numbers.setdefault(row, len(numbers))
            look: dict[str, Any] = {'color': colour_of(number), 'marker': marker_of(number, '')}
            axes.plot(range(1, len(mean) + 1), mean, linestyle=styles[part], label=label, **look)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(
        title='way that is left to the last checkpoint, mean over seeds',
        xlabel='checkpoint',
        ylabel='share of the way since the first',
    )
    axes.grid(alpha=0.3)


def _of_equal_length(curves: list[list[float]]) -> list[list[float]]:
    """The curves of the runs that have kept the most checkpoints."""
    most = max(map(len, curves))
    return [curve for curve in curves if len(curve) == most]
