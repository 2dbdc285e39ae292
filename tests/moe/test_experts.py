"""Stacked experts: start, layout, and what they cost."""

import copy

import pytest
import timm.layers
import torch
from torch import nn

from vqmoe_vision.moe.experts import Experts, StackedLinear
from vqmoe_vision.moe.kernels import KERNELS, use_kernel


def test_every_expert_starts_with_the_spread_of_a_vit_layer():
    experts = Experts(8, 384, 512)
    for linear in (experts.fc1, experts.fc2):
        spread = linear.weight.flatten(1).std(dim=1)
        # 196608 draws: the standard error of a standard deviation is 0.02 / sqrt(2 n) = 3e-5
        torch.testing.assert_close(spread, torch.full((8,), 0.02), rtol=0, atol=2e-4)
        assert torch.equal(linear.bias, torch.zeros_like(linear.bias))


def test_experts_differ_at_the_start():
    weight = Experts(4, 8, 16).fc1.weight
    assert not any(torch.equal(weight[0], weight[i]) for i in range(1, 4))


@pytest.mark.parametrize('bias', [True, False])
def test_parameters_are_stacked_and_named_as_timm_names_them(bias):
    shapes = {name: tuple(p.shape) for name, p in Experts(4, 8, 16, bias=bias).named_parameters()}
    expected = {'fc1.weight': (4, 16, 8), 'fc2.weight': (4, 8, 16)}
    if bias:
        expected |= {'fc1.bias': (4, 16), 'fc2.bias': (4, 8)}
    assert shapes == expected


def test_an_expert_equals_timm_mlp_with_its_weights():
    experts, mlp = Experts(3, 8, 16), timm.layers.Mlp(8, 16)
    with torch.no_grad():
        for ours, theirs in ((experts.fc1, mlp.fc1), (experts.fc2, mlp.fc2)):
            nn.init.normal_(ours.weight)
            nn.init.normal_(ours.bias)
            theirs.weight.copy_(ours.weight[1])
            theirs.bias.copy_(ours.bias[1])
    x = torch.randn(5, 8)
    torch.testing.assert_close(experts(x, torch.tensor([0, 5, 5], dtype=torch.int32)), mlp(x))


def test_params_per_expert():
    # fc1 16 * 8 + 16, fc2 8 * 16 + 8
    assert Experts(4, 8, 16).params_per_expert() == 280


def test_dropout_only_while_training():
    experts = Experts(2, 8, 16, drop=0.5)
    nn.init.normal_(experts.fc2.bias)
    x, offsets = torch.randn(6, 8), torch.tensor([3, 6], dtype=torch.int32)
    assert (experts(x, offsets) == 0).any()
    experts.eval()
    assert torch.equal(experts(x, offsets), experts(x, offsets))
    assert (experts(x, offsets) != 0).all()


def test_activation_is_the_one_asked_for():
    experts = Experts(1, 2, 2, act_layer=nn.ReLU)
    with torch.no_grad():
        experts.fc1.weight.copy_(torch.eye(2))
        experts.fc2.weight.copy_(torch.eye(2))
    out = experts(torch.tensor([[-1.0, 2.0]]), torch.tensor([1], dtype=torch.int32))
    assert out.tolist() == [[0.0, 2.0]]


def test_stacked_linear_prints_its_sizes():
    assert repr(StackedLinear(4, 8, 16)) == 'StackedLinear(num_experts=4, 8 -> 16)'


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


@pytest.mark.parametrize('kernel', KERNELS)
def test_separate_experts_refuse_a_kernel_by_name(kernel):
    experts = Experts(2, 8, 16)
    experts.separate()
    rows, offsets = torch.randn(4, 8), torch.tensor([1, 4], dtype=torch.int32)
    message = f"kernel='{kernel}' is not possible: leave use_kernel out, no kernel runs experts"
    with use_kernel(kernel), pytest.raises(ValueError, match=message):
        experts(rows, offsets)
    assert experts(rows, offsets).shape == (4, 8)
