"""Repeats the first losses of runs: whether rows still say what today's code does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from vqmoe_vision.provenance import commit

from .runs import ONE_THREAD, Run

TOLERANCE = 1e-3  # relative: another processor rounds differently


def repeat(run: Run, content: dict[str, Any]) -> dict[str, Any]:
    """Trains for as many iterations as a row keeps losses of, and compares them.

    Args:
        run: Of the row.
        content: Of its file.

    Returns:
        The finding: `equal`, the losses that it is about, where it comes from, and the options of
        MoE layers that it was made with.

    Raises:
        ValueError: The training fails.
    """
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
    losses = record['first_losses']
    kept = content['first_losses']
    off = [abs(now - then) / abs(then) for now, then in zip(losses, kept, strict=True)]
    worst = max(range(len(off)), key=off.__getitem__)
    return {
        'equal': off[worst] <= TOLERANCE,
        'finding': f'loss {worst + 1} is {losses[worst]:.6g}, was {kept[worst]:.6g}',
        'largest_relative_difference': off[worst],
        'commit': commit(),
        'losses': kept,
        'moe_options': record['moe_options'],
    }
