"""Trainings that are killed end as they would have: the short form of `make soak`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .. import cases

ROOT = Path(__file__).parents[2]


def soak(tmp_path: Path, *arguments: str) -> dict:
    """A process of its own: it forks, which one with threads must not."""
    out = tmp_path / 'kills.json'
    program = str(ROOT / 'tests/soak/kills.py')
    command = [sys.executable, '-W', 'ignore', program, *arguments, '--out', str(out)]
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert out.is_file(), done.stderr
    return json.loads(out.read_text())


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_all_kinds(tmp_path):
    figures = soak(tmp_path, '--kills', '20', '--seed', '3')
    assert figures['faults'] == []
    assert sum(figures['kills'].values()) == 20


@pytest.mark.long
@pytest.mark.timeout(1200)  # eleven starts of up to four processes, on a machine that may be busy
@cases(
    'ranks, options',
    ('2', ()),
    ('4', ()),
    ('2', ('--spread', 'full')),
    ('2', ('--spread', 'sharded')),
    ids=['2', '4', '2-full', '2-sharded'],
)
def test_killed_ranks_are_started_again_and_go_on(tmp_path, ranks, options):
    figures = soak(tmp_path, '--ranks', ranks, '--kills', '10', *options)[ranks]
    assert figures['faults'] == []
    assert sum(figures['kills'].values()) == 10
