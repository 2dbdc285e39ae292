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


def test_a_round_repeats_and_the_next_differs(cell: Cell) -> None:
    first, again, second = (Inputs(cell).batch(index) for index in (0, 0, 1))
    for a, b, other in zip(
        *(vars(batch).values() for batch in (first, again, second)), strict=True
    ):
        assert torch.equal(a, b)
        assert not torch.equal(a, other)
