"""Numbers by counters: uniform, unrelated, the same compiled, and chosen by their weights."""

import torch

from vqmoe_vision.moe.codebooks.usage import random_choice, random_integers

ROWS = torch.arange(2**16)


def mixed(value: int) -> int:
    """The mixing function in integers without bounds, as it is written for C's uint32."""
    value ^= value >> 16
    value = value * 0x21F0AAAD % 2**32
    value ^= value >> 15
    value = value * 0x735A2D97 % 2**32
    return value ^ value >> 15


def test_numbers_are_those_of_arithmetic_without_bounds() -> None:
    # two counters of which one has more than 32 bits
    stream = mixed((mixed((mixed(2) + 5) % 2**32) + 2**40 + 7) % 2**32)
    expected = [mixed((mixed(row) + stream) % 2**32) for row in range(1000)]
    assert random_integers(ROWS[:1000], 5, 2**40 + 7).tolist() == expected
    assert random_integers(ROWS[:1000], torch.tensor(5), 2**40 + 7).tolist() == expected


def test_choices_follow_their_weights() -> None:
    weights = torch.tensor([0.0, 1.0, 2.0, 0.0, 5.0, 1e-6])
    picks = random_choice(weights.expand(2**16, -1), torch.tensor(3))
    counts = torch.bincount(picks, minlength=6)
    assert counts[0] == counts[3] == 0 and counts[5] <= 2
    # 8192, 16384 and 40960, of standard deviations up to 124
    expected = torch.tensor([8192, 16384, 40960])
    assert (counts[[1, 2, 4]] - expected).abs().max() < 5 * 124
