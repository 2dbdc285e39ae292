"""Repeats the first losses of runs: whether rows still say what today's code does."""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vqmoe_vision.provenance import commit

from .runs import ONE_THREAD, Run

TOLERANCE = 1e-3  # relative: another processor rounds differently


def repeat(run: Run, content: dict[str, Any]) -> dict[str, Any]:
    """Trains for as many iterations as a row keeps losses of, and compares them."""
    _require_sources(run)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = run.train(folder, 'default_hooks.record.only_first=True')
        environment = {**os.environ, **ONE_THREAD}
        done = subprocess.run(
            [sys.executable, *command[1:]], capture_output=True, text=True, env=environment
        )
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise ValueError(f'{run.name} cannot be repeated: {lines[-1] if lines else "killed"}')
        record = json.loads((folder / 'run.json').read_text())
    weights = record['starting_weights']
    if content.get('starting_weights', weights) != weights:
        there = ', '.join(f'{name} ({digest})' for name, digest in weights.items())
        raise ValueError(f'{run.name} cannot be repeated: it began with other weights than {there}')
    found = compared(record['first_losses'], content['first_losses'], run.name)
    return {'commit': commit(), **found}


def _require_sources(run: Run) -> None:
    for first, checkpoint in run.sources.values():
        if checkpoint.is_file():
            continue
        train = shlex.join(first.train(first.folder))
        raise ValueError(
            f'{run.name} cannot be repeated: it starts from {checkpoint}, which is not there; '
            f'first: {train}'
        )


def compared(losses: Sequence[float], kept: Sequence[float], name: str) -> dict[str, Any]:
    """Whether losses came out again; those that are no number never did."""
    if len(losses) != len(kept):
        raise ValueError(f'{name}: its row has {len(kept)} first losses, today has {len(losses)}')
    off = [_distance(now, then) for now, then in zip(losses, kept, strict=True)]
    worst = max(range(len(off)), key=off.__getitem__)
    return {
        'equal': all(distance <= TOLERANCE for distance in off),
        'finding': f'loss {worst + 1} is {losses[worst]:.6g}, was {kept[worst]:.6g}',
        'largest_relative_difference': off[worst] if math.isfinite(off[worst]) else None,
    }


def _distance(now: float, then: float) -> float:
    """Relative, and infinite where either is no number: nan would pass every comparison by."""
    distance = abs(now - then) / abs(then) if then else abs(now - then)
    return math.inf if math.isnan(distance) else distance
