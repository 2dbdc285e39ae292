"""Repeats the first losses of runs: whether rows still say what today's code does."""

from __future__ import annotations

import json
import math
import os
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


def compared(losses: Sequence[float], kept: Sequence[float], name: str) -> dict[str, Any]:
    """Whether losses came out again; those that are no number never did."""
    if len(losses) != len(kept):
        raise ValueError(f'{name}: its row has {len(kept)} first losses, today has {len(losses)}')
    pairs = zip(losses, kept, strict=True)
    off = [abs(now - then) / (abs(then) or 1) for now, then in pairs]
    off = [math.inf if math.isnan(distance) else distance for distance in off]
    worst = off.index(max(off))
    return {
        'equal': max(off) <= TOLERANCE,
        'finding': f'loss {worst + 1} is {losses[worst]:.6g}, was {kept[worst]:.6g}',
        'largest_relative_difference': max(off) if math.isfinite(max(off)) else None,
    }
