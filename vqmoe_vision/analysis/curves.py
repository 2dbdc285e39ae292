"""Curves of a training run, from the `scalars.json` that mmengine's local backend writes.

Needs matplotlib (extra `train`).
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

Record = dict[str, Any]
Curve = tuple[list[float], list[float]]  # steps, values


@dataclass(frozen=True)
class Panel:
    """One pair of axes: all scalars whose whole name matches `pattern`."""

    title: str
    pattern: str


PANELS = (
    Panel('Training loss', r'loss'),
    Panel('Held-out accuracy (%)', r'accuracy/top1'),
    Panel('Held-out mIoU (%)', r'mIoU'),
    Panel('Auxiliary losses, weighted', r'.+/.+_loss'),
    Panel('Unused experts, held-out images', r'val/.*/load_unused'),
    Panel('Largest load of an expert, held-out images', r'val/.*/load_max'),
    Panel('Codebook perplexity, held-out images', r'val/.*/code_usage_perplexity'),
)


def newest_scalars(work_dir: Path) -> Path:
    """Finds the `scalars.json` of the last run that was started in `work_dir`."""
    # mmengine names the folder of a start by its time, so the names sort by time.
    found = sorted(work_dir.glob('*/vis_data/scalars.json'))
    if not found:
        raise ValueError(f'work_dir: no */vis_data/scalars.json in {work_dir}; train first')
    return found[-1]


def read_scalars(path: Path) -> list[Record]:
    """Reads the records of a run, oldest first: one JSON object per line."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def curves(records: list[Record]) -> dict[str, Curve]:
    """Collects each scalar's steps and values."""
    collected: dict[str, Curve] = {}
    iteration = 0
    for record in records:
        # a validation has its epoch as step, and is placed at the iteration before it
        if 'iter' in record:
            iteration = record['step']
        for name, value in record.items():
            if isinstance(value, (int, float)):
                steps, values = collected.setdefault(name, ([], []))
                steps.append(iteration)
                values.append(value)
    return collected


def plot_curves(records: list[Record], title: str, panels: tuple[Panel, ...] = PANELS) -> Figure:
    """Draws one panel per kind of scalar that the run has."""
    collected = curves(records)
    drawn = {
        panel.title: {n: c for n, c in collected.items() if re.fullmatch(panel.pattern, n)}
        for panel in panels
    }
    drawn = {panel_title: named for panel_title, named in drawn.items() if named}
    if not drawn:
        raise ValueError(f'records: none of the scalars {sorted(collected)} belongs to a panel')

    columns = min(len(drawn), 3)
    rows = -(-len(drawn) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.4 * rows), layout='constrained')
    figure.suptitle(title)
    for i, (panel_title, named) in enumerate(drawn.items()):
        axes = figure.add_subplot(rows, columns, i + 1)
        for name, (steps, values) in named.items():
            # A validation curve of few points would be invisible without markers.
            axes.plot(
                steps,
                values,
                label=name.removeprefix('val/'),
                marker='o' if len(steps) < 15 else None,
            )
        axes.set(title=panel_title, xlabel='iteration')
        axes.grid(alpha=0.3)
        if not any(any(values) for _, values in named.values()):
            axes.set_ylim(-0.05, 1)  # around a flat zero, the default would show tiny fractions
        if len(named) > 1:
            axes.legend(fontsize='small')
    return figure
