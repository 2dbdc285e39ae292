"""Arithmetic of times, the order of rounds, and peak memory."""

import os
import subprocess
import sys

import pytest
import torch

from benchmark.environment import MALLOC
from benchmark.timing import WARM_UP, interleave, median, peak_memory, ratio


def test_ratio_is_median_over_median() -> None:
    # medians 3 and 2; means would give 34.7 / 2
    assert median([1.0, 100.0, 3.0]) == 3.0
    assert ratio([1.0, 100.0, 3.0], [2.0, 1.0, 3.0]) == 1.5


def test_every_round_runs_every_step_and_warm_up_does_not_count() -> None:
    calls: list[tuple[int, str]] = []

    def step(name: str, index: int) -> dict[str, float]:
        calls.append((index, name))
        return {'step': float(index)}

    steps = {name: (lambda index, name=name: step(name, index)) for name in 'abc'}
    times = interleave(steps, 20)
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert [sorted(r) for r in rounds] == [[(i, n) for n in 'abc'] for i in range(WARM_UP + 20)]
    assert len({tuple(name for _, name in r) for r in rounds}) > 1  # not always in one order
    assert times['a']['step'] == [float(WARM_UP + i) for i in range(20)]


def test_peak_counts_what_is_alive_together() -> None:
    def step() -> None:
        a = torch.empty(1000)  # 4,000 bytes
        b = torch.empty(500)  # 2,000 beside it: 6,000
        del a
        torch.empty(750)  # 3,000 beside b: 5,000
        del b

    # the allocator's sizes are exact, blocks are aligned but not rounded
    assert peak_memory(step, 'cpu') == pytest.approx(6000, abs=128)


PROGRAM = """
import os
from benchmark.environment import MALLOC, restart_prepared
restart_prepared(3)
print(os.environ['OMP_NUM_THREADS'], *(os.environ.get(name) for name in MALLOC))
"""


def test_restarts_once_with_the_environment_it_needs() -> None:
    environment = {k: v for k, v in os.environ.items() if k not in MALLOC}
    environment['OMP_NUM_THREADS'] = '1'
    environment['PYTHONPATH'] = os.pathsep.join(sys.path)
    command = [sys.executable, '-c', PROGRAM]
    lines = subprocess.check_output(command, text=True, env=environment).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith('restarting with OMP_NUM_THREADS=3')
    assert lines[1].startswith('3 ')
    if 'MALLOC_TOP_PAD_' in lines[0]:  # glibc
        assert lines[1] == ' '.join(['3', *MALLOC.values()])
