"""Repeats the first losses of runs: whether rows still say what today's code does."""

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
from .store import load

TOLERANCE = 1e-3  # relative: another processor rounds differently


def repeat(run: Run, content: dict[str, Any]) -> dict[str, Any]:
    """Trains for as many iterations as a row keeps losses of, and compares them."""
    with tempfile.TemporaryDirectory() as folder:
        command = run.train(Path(folder), 'default_hooks.record.only_first=True')[1:]
        environment = {**os.environ, **ONE_THREAD}
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, env=environment
        )
        if done.returncode != 0:
            last = (done.stderr.strip() or 'killed').splitlines()[-1]
            raise ValueError(f'{run.name} cannot be repeated: {last}')
        record = load(Path(folder) / 'run.json')
    weights = record['starting_weights']
    if content.get('starting_weights', weights) != weights:
        there = ', '.join(f'{name} ({digest})' for name, digest in weights.items())
        raise ValueError(f'{run.name} cannot be repeated: it began with other weights than {there}')
    return {'commit': commit(), **compared(record['first_losses'], content['first_losses'])}


def compared(losses: Sequence[float], kept: Sequence[float]) -> dict[str, Any]:
    """Whether losses came out again; those that are no number never did."""
    off = [abs(now - then) / (abs(then) or 1) for now, then in zip(losses, kept, strict=True)]
    off = [math.inf if math.isnan(distance) else distance for distance in off]
    worst = off.index(max(off))
    return {
        'equal': off[worst] <= TOLERANCE,
        'finding': f'loss {worst + 1} is {losses[worst]:.6g}, was {kept[worst]:.6g}',
        'largest_relative_difference': off[worst] if math.isfinite(off[worst]) else None,
    }
