"""Arithmetic of times, the order of rounds, and peak memory."""

import pytest
import torch

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
