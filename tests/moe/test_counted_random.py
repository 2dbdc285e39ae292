"""Numbers by counters: uniform, unrelated, the same compiled, and chosen by their weights."""

import pytest
import torch
from torch import Tensor

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


def chi_square(counts: Tensor) -> float:
    """In standard deviations from its mean."""
    expected, freedom = counts.sum() / counts.numel(), counts.numel() - 1
    return (((counts - expected) ** 2 / expected).sum().item() - freedom) / (2 * freedom) ** 0.5


# streams that a codebook draws from: of updates, passes and ranks; of updates; and of k-means
STREAMS = [
    (0, 0, 0),
    (1, 0, 0),
    (2, 0, 0),
    (1000, 1, 0),
    (1000, 0, 1),
    (0,),
    (1,),
    (10**6,),
    (0, 0),
]


@pytest.mark.parametrize('counters', STREAMS, ids=str)
@pytest.mark.parametrize('bits', [range(24, 32), range(8, 16)], ids=['high', 'low'])
def test_numbers_are_uniform(counters: tuple[int, ...], bits: range) -> None:
    # five standard deviations: 1 of 10^6 sets of truly random numbers is further away
    found = random_integers(ROWS, *counters) >> bits.start & 255
    assert abs(chi_square(torch.bincount(found, minlength=256))) < 5


@pytest.mark.parametrize('backend', ['aot_eager', pytest.param('inductor', marks=pytest.mark.long)])
def test_compiled_numbers_are_the_same(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(random_integers, fullgraph=True, backend=backend)
    for updates, number in [(0, 0), (1, 0), (1, 1), (2**31, 2)]:
        counters = (torch.tensor(updates), number, 0)
        expected = random_integers(ROWS[:1000], *counters)
        assert torch.equal(compiled(ROWS[:1000], *counters), expected)
        assert torch.equal(random_integers(ROWS[:1000], *counters), expected)


def test_choices_follow_their_weights() -> None:
    weights = torch.tensor([0.0, 1.0, 2.0, 0.0, 5.0, 1e-6])
    picks = random_choice(weights.expand(2**16, -1), torch.tensor(3))
    counts = torch.bincount(picks, minlength=6)
    assert counts[0] == counts[3] == 0 and counts[5] <= 2
    # 8192, 16384 and 40960, of standard deviations up to 124
    expected = torch.tensor([8192, 16384, 40960])
    assert (counts[[1, 2, 4]] - expected).abs().max() < 5 * 124


def test_a_weight_of_zero_is_not_chosen_where_a_number_rounds_to_one() -> None:
    row, counter = 96469, 1485
    assert random_integers(torch.tensor([row]), counter).float() == 2.0**32
    weights = torch.zeros(row + 1)
    weights[-1] = 1.0
    assert random_choice(weights, counter).item() == row
    # the last clock to ring all the same
    weights[0] = 1e-3
    assert random_choice(weights, counter).item() == 0


def test_an_operator_that_compilers_can_trace() -> None:
    operator = torch.ops.vqmoe_vision.random_integers
    torch.library.opcheck(operator, (ROWS[:9], [torch.tensor(5)], [7]))
    torch.library.opcheck(operator, (ROWS[:9], [], [7, 0]))
