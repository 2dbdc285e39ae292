"""Routings have the load they claim, and are new in every round."""

import pytest
import torch

from benchmark.cells import Cell
from benchmark.inputs import Inputs, skewed_routing


@pytest.mark.parametrize(
    ('experts', 'top_k', 'skew', 'fullest'),
    [
        # 240 tokens; the fullest expert has skew * 240 * K / E assignments
        (8, 1, 5.0, 150),
        (8, 1, 1.0, 30),
        (8, 2, 4.0, 240),
        (4, 2, 1.5, 180),
        (1, 1, 1.0, 240),
    ],
)
def test_fullest_expert_has_the_load_asked_for(experts, top_k, skew, fullest) -> None:
    cell = Cell(tokens=120, batch=2, width=4, experts=experts, top_k=top_k, skew=skew)
    indices = skewed_routing(cell, torch.Generator().manual_seed(0), full=experts - 1)
    counts = indices.flatten().bincount(minlength=experts)
    assert indices.shape == (240, top_k)
    assert counts[-1] == fullest
    assert counts.sum() == 240 * top_k


def test_no_token_goes_to_an_expert_twice(cell: Cell) -> None:
    indices = Inputs(cell).batch(0).indices
    assert (indices[:, 0] != indices[:, 1]).all()


def test_other_experts_share_the_rest_evenly() -> None:
    # 40,000 tokens less 20,000 over three experts: 6,667 each, standard deviation 67
    cell = Cell(tokens=20_000, batch=2, width=4, experts=4, top_k=1, skew=2.0)
    counts = Inputs(cell).batch(0).indices.flatten().bincount()
    assert counts[0] == 20_000
    assert ((counts[1:] - 6_667).abs() < 350).all()


def test_a_round_repeats_and_the_next_differs(cell: Cell) -> None:
    first, again, second = (Inputs(cell).batch(index) for index in (0, 0, 1))
    for a, b, other in zip(
        *(vars(batch).values() for batch in (first, again, second)), strict=True
    ):
        assert torch.equal(a, b)
        assert not torch.equal(a, other)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'skew': 5.0, 'top_k': 2}, r'skew=5.0 is not possible: from 1 to experts / top_k = 4'),
        ({'top_k': 9}, r'top_k=9 is not possible: at most experts=8'),
        ({'tokens': 0}, r'tokens=0 is not possible: at least 1'),
        ({'amp': True}, r'amp=True is not possible: autocast needs'),
    ],
)
def test_impossible_cells_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        Cell(**options)
