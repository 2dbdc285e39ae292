"""Trainings that are killed end as they would have: the short form of `make soak`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .. import cases

ROOT = Path(__file__).parents[2]


@pytest.mark.long
@pytest.mark.timeout(1200)  # eleven starts of two processes, on a machine that may be busy
@cases(
    'options, kills',
    ('--seed 3', 20),
    ('--ranks 2', 10),
    ('--ranks 2 --spread full', 10),
    ('--ranks 2 --spread sharded', 10),
    ids=['all kinds', '2', '2-full', '2-sharded'],
)
def test_trainings_that_are_killed_go_on_and_end_as_they_would_have(tmp_path, options, kills):
    """In a process of its own: it forks, which one with threads must not."""
    program, out = str(ROOT / 'tests/soak/kills.py'), tmp_path / 'kills.json'
    command = [sys.executable, '-W', 'ignore', program, *options.split(), '--kills', str(kills)]
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(
        [*command, '--out', str(out)], env=environment, capture_output=True, text=True
    )
    assert out.is_file(), done.stderr
    figures = json.loads(out.read_text())
    assert figures['faults'] == []
    assert sum(figures['kills'].values()) == kills
