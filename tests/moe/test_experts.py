"""Stacked experts: start, layout, and what they cost."""

import copy

import pytest
import torch
from torch import nn

from vqmoe_vision.moe.experts import Experts


def test_every_expert_starts_with_the_spread_of_a_vit_layer():
    experts = Experts(8, 384, 512)
    for linear in (experts.fc1, experts.fc2):
        spread = linear.weight.flatten(1).std(dim=1)
        # 196608 draws: the standard error of a standard deviation is 0.02 / sqrt(2 n) = 3e-5
        torch.testing.assert_close(spread, torch.full((8,), 0.02), rtol=0, atol=2e-4)
        assert torch.equal(linear.bias, torch.zeros_like(linear.bias))


@pytest.mark.parametrize('bias', [True, False])
def test_separate_experts_equal_stacked_ones_in_every_call(bias):
    stacked = Experts(3, 8, 16, bias=bias).double()
    for parameter in stacked.parameters():
        nn.init.normal_(parameter)
    separate = copy.deepcopy(stacked)
    separate.separate()
    rows = torch.randn(7, 8, dtype=torch.float64)
    # the second expert has no rows, and the last two rows are of no expert
    offsets = torch.tensor([2, 2, 5], dtype=torch.int32)
    # float64: kernels sum in another order
    close = {'rtol': 1e-12, 'atol': 1e-12}
    torch.testing.assert_close(separate.fc1(rows, offsets), stacked.fc1(rows, offsets), **close)
    torch.testing.assert_close(separate(rows, offsets)[:5], stacked(rows, offsets)[:5], **close)
    for own in (rows, rows[:0]):
        torch.testing.assert_close(separate.fc1.one(2, own), stacked.fc1.one(2, own), **close)
    even = rows[:6].view(3, 2, 8)
    torch.testing.assert_close(separate.fc1.evenly(even), stacked.fc1.evenly(even), **close)
    assert separate.params_per_expert() == stacked.params_per_expert()
