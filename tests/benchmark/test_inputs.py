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


def test_a_round_repeats_and_the_next_differs(cell: Cell) -> None:
    first, again, second = (vars(Inputs(cell).batch(index)) for index in (0, 0, 1))
    assert (first['indices'][:, 0] != first['indices'][:, 1]).all()
    for name, value in first.items():
        assert torch.equal(value, again[name]) and not torch.equal(value, second[name])
