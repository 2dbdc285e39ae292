"""Dispatch against two plain loops: outputs and every gradient, in every dtype and odd case."""

import copy
from contextlib import nullcontext

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from vqmoe_vision.moe import dispatch
from vqmoe_vision.moe.experts import Experts
from vqmoe_vision.moe.kernels import Groups, make_plan, use_kernel
from vqmoe_vision.moe.routing import Routing

from .. import cases, refused
from .naive_experts import SHAPES, assert_same, make_case, naive, run_and_backward


def is_padded(indices, dtype):
    """Whether there are rows that only fill one of four groups."""
    return len(make_plan(indices.flatten(), 4, dtype).order) > indices.numel()


@pytest.mark.parametrize('bias', [True, False], ids=['bias', 'no bias'])
@pytest.mark.parametrize('shape', SHAPES.values(), ids=SHAPES)
def test_padded_groups_equal_the_naive_loops(shape, bias, two_threads):
    case = make_case(*shape, bias)
    if shape == SHAPES['near even']:
        assert is_padded(case[2], torch.float64)
    assert_same(run_and_backward(dispatch.run_experts, *case), run_and_backward(naive, *case))


# widths that suit grouped_mm, but for float64 and half of a layer of 22
@pytest.mark.parametrize('kernel', ['', 'batched', 'grouped_mm', 'reference'])
@pytest.mark.parametrize('bias', [True, False], ids=['bias', 'no bias'])
@cases(
    'form',
    dict(gate='first'), dict(gate='last'), dict(gate='separate'), dict(norm_eps=0.1),
    dict(gate='first', norm_eps=0.1), dict(gate='separate', norm_eps=0.1), ids=str,
)  # fmt: skip
def test_gated_and_normed_experts_equal_the_naive_loops(form, bias, kernel, two_threads):
    case = make_case(30, 4, 2, 8, 16, bias, **form)
    kept = torch.rand(30, 2) < 0.8
    expected = run_and_backward(naive, *case, kept)
    if kernel == 'grouped_mm':
        experts, x, indices, weights = case
        case = experts.float(), x.float(), indices, weights.float()
    with use_kernel(kernel) if kernel else nullcontext():
        found = run_and_backward(dispatch.run_experts, *case, kept)
    close = {'rtol': 1e-4, 'atol': 1e-4} if kernel == 'grouped_mm' else {}
    assert_same(found, expected, **close)


@cases('form', {}, dict(bias=False), *(dict(gate=g, norm_eps=0.1) for g in ('first', 'separate')))
def test_stacked_and_separate_experts_are_the_same_in_every_call(form):
    stacked, *_ = make_case(1, 3, 1, 8, 16, **{'bias': True, **form})
    separate = copy.deepcopy(stacked)
    separate.separate()
    rows = torch.randn(7, 8, dtype=torch.float64)
    # the second expert has no rows, and the last two rows are of no expert
    groups = Groups(torch.tensor([2, 2, 5], dtype=torch.int32))
    torch.testing.assert_close(separate(rows, groups)[:5], stacked(rows, groups)[:5])
    assert separate.params_per_expert() == stacked.params_per_expert()
    even, ends = rows[:6].view(3, 2, 8), Groups(torch.tensor([2, 4, 6], dtype=torch.int32))
    expected = stacked(rows[:6], ends).view(even.shape)
    for experts in (stacked, separate):
        torch.testing.assert_close(experts.evenly(even), expected)
        for expert, own in enumerate(even):
            torch.testing.assert_close(experts.one(expert, own), expected[expert])
        assert experts.one(2, rows[:0]).shape == (0, 8)


def test_a_kernel_has_to_suit_half_of_a_gated_layer():
    # rows of grouped_mm are multiples of 16 bytes: 24 numbers are, 12 are not
    for width, fits in ((12, False), (16, True)):
        experts = Experts(2, 16, width, gate='first', device='meta', dtype=torch.bfloat16)
        rows = torch.empty(6, 16, device='meta', dtype=torch.bfloat16, requires_grad=True)
        groups = Groups(torch.empty(2, device='meta', dtype=torch.int32))
        with use_kernel('grouped_mm'):
            if fits:
                experts(rows, groups).sum().backward()
            else:
                refused(r"kernel='grouped_mm'.* width \[12, 16\]", experts, rows, groups)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_a_token_that_is_not_finite_spoils_only_its_own_expert(dtype, two_threads):
    experts, x, indices, weights = make_case(70, 4, 1, 8, 16, bias=True)
    assert is_padded(indices, dtype)
    x[0] = torch.inf
    case = experts.to(dtype), x.to(dtype), indices, weights.to(dtype)
    found = run_and_backward(dispatch.run_experts, *case)
    own = indices[0].item()
    assert not found['fc1.weight'][own].isfinite().all()
    others = [e for e in range(4) if e != own]
    for name, value in found.items():
        rows = slice(1, None) if name in ('x', 'out', 'weights') else others
        assert value[rows].isfinite().all(), name


@pytest.mark.parametrize('trained', [(), ('fc1.bias',), ('fc2.weight',)], ids=str)
def test_frozen_parameters_get_no_gradient_and_change_no_other(trained):
    case = make_case(12, 4, 2, 8, 16, bias=True)
    expected = run_and_backward(naive, *case)
    for name, parameter in case[0].named_parameters():
        parameter.requires_grad_(name in trained)
    found = run_and_backward(dispatch.run_experts, *case)
    frozen = {name for name, _ in case[0].named_parameters()} - set(trained)
    assert all(found.pop(name) is None for name in frozen)
    assert_same(found, {name: expected[name] for name in found})


# of torch 2.15, where it looks at the inputs that it has made itself
@pytest.mark.filterwarnings('ignore:The .grad attribute of a Tensor that is not a leaf')
def test_operators_are_registered_correctly():
    x, weight, bias = torch.randn(6, 3), torch.randn(3, 5, 3), torch.randn(3, 5)
    ends, ours = torch.tensor([2, 2, 5], dtype=torch.int32), torch.ops.vqmoe_vision
    for vector in (bias, None):
        torch.library.opcheck(ours.grouped_linear, (x, weight, vector, ends))
    for wanted in ([True, True, True], [False, True, False]):
        args = (torch.randn(6, 5), x, weight, ends, wanted)
        torch.library.opcheck(ours.grouped_linear_backward, args)
    for length in (8, 0):
        torch.library.opcheck(ours.padded_plan, (torch.tensor([1, 0, 2, 1, 1]), 2, 1, length))


@pytest.mark.usefixtures('two_threads')
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 30), st.integers(1, 5), st.integers(0, 60), st.integers(0, 2**31))
def test_tokens_with_any_number_of_experts(num_tokens, num_experts, count, seed):
    experts, x, _, _ = make_case(num_tokens, num_experts, 1, 5, 7, bias=True, seed=seed)
    torch.manual_seed(seed)  # in any order: none for some, one expert twice for some
    tokens, indices = torch.randint(num_tokens, (count,)), torch.randint(num_experts, (count,))
    weights = torch.rand(count, dtype=torch.float64)
    actual = run_and_backward(dispatch.run_experts, experts, x, indices, weights, None, tokens)
    if count > 0:
        assert_same(actual, run_and_backward(naive, experts, x, indices, weights, None, tokens))
    alone = torch.bincount(tokens, minlength=num_tokens) == 0
    assert torch.equal(actual['out'][alone], torch.zeros_like(x[alone]))


@pytest.mark.parametrize('k', [2, 3])
def test_assignments_with_inputs_of_their_own(k, two_threads):
    experts, _, indices, weights = make_case(30, 4, k, 5, 7, bias=True)
    case = experts, torch.randn(30 * k, 5, dtype=torch.float64), indices, weights

    def by_one(experts, x, routing):
        """30 * k tokens of one expert each, whose answers are added by threes or twos."""
        single = Routing(routing.indices.reshape(-1, 1), routing.weights.view(-1, 1))
        return naive(experts, x, single).view(30, k, 5).sum(dim=1)

    assert_same(run_and_backward(dispatch.run_experts, *case), run_and_backward(by_one, *case))
