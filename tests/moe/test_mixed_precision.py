"""Experts in float32 under autocast, by every kernel, and with the loss scale of float16."""

import copy

import pytest
import torch

from vqmoe_vision.moe import dispatch
from vqmoe_vision.moe.kernels import KERNELS, use_kernel
from vqmoe_vision.moe.routing import Routing

from .naive_experts import TOLERANCES, assert_same, make_case, naive, run_and_backward

LOW = [torch.bfloat16, torch.float16]
# of a loss: its gradients are too small for float16, where the smallest number is 6e-8
TINY = 1e-9


def require(kernel, x, weight, dtype):
    """Leaves out what a test of its own sees refused: widths, or an old torch."""
    if problem := KERNELS[kernel].misfit(x.to(dtype), weight.to(dtype)):
        pytest.skip(problem)


@pytest.mark.parametrize('dtype', LOW, ids=str)
@pytest.mark.parametrize('kernel', KERNELS)
@pytest.mark.parametrize('drop', [False, True])
@pytest.mark.parametrize(
    'shape', [(12, 4, 1, 8, 16), (12, 4, 2, 8, 16), (12, 4, 2, 5, 11)], ids=str
)
def test_autocast_computes_in_low_precision_and_returns_gradients_in_float32(
    shape, drop, kernel, dtype
):
    experts, x, indices, weights = make_case(*shape, bias=True)
    experts, x, weights = experts.float(), x.float(), weights.float()
    require(kernel, x, experts.fc1.weight, dtype)
    kept = torch.rand(weights.shape) < 0.6 if drop else None
    expected = run_and_backward(naive, experts, x, indices, weights, kept)
    with use_kernel(kernel), torch.autocast('cpu', dtype):
        actual = run_and_backward(dispatch.run_experts, experts, x, indices, weights, kept)
    dtypes = {name: value.dtype for name, value in actual.items()}
    assert dtypes.pop('out') == dtype
    assert set(dtypes.values()) == {torch.float32}
    assert_same(actual, expected, **TOLERANCES[dtype])


def test_autocast_leaves_float64_alone():
    case = make_case(12, 4, 2, 8, 16, bias=True)
    with torch.autocast('cpu', torch.bfloat16):
        actual = run_and_backward(dispatch.run_experts, *case)
        assert_same(actual, run_and_backward(naive, *case))
    assert actual['out'].dtype == torch.float64


def scaled_step(experts, x, routing, kernel, scale):
    """A step of SGD under float16, as mmengine's `AmpOptimWrapper` takes it on a card.

    Returns:
        Gradients without the scale, and the scale that the next step has.
    """
    optimizer = torch.optim.SGD(experts.parameters(), lr=1 / TINY)
    scaler = torch.amp.GradScaler('cpu', init_scale=scale)
    with use_kernel(kernel), torch.autocast('cpu', torch.float16):
        out = dispatch.run_experts(experts, x, routing)
        assert out.dtype == torch.float16
        loss = out.float().square().sum() * TINY
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    grads = {name: p.grad.clone() for name, p in experts.named_parameters()}
    scaler.step(optimizer)
    scaler.update()
    return grads, scaler.get_scale()


def case_of(kernel):
    experts, x, indices, weights = make_case(12, 4, 2, 8, 16, bias=True)
    experts, x = experts.float(), x.float()
    require(kernel, x, experts.fc1.weight, torch.float16)
    return experts, x, Routing(indices, weights.float())


@pytest.mark.parametrize('kernel', KERNELS)
def test_a_scaled_step_of_float16_is_that_of_float32(kernel):
    experts, x, routing = case_of(kernel)
    whole = copy.deepcopy(experts)
    (naive(whole, x, routing).square().sum() * TINY).backward()
    expected = {name: p.grad / TINY for name, p in whole.named_parameters()}
    unscaled, _ = scaled_step(copy.deepcopy(experts), x, routing, kernel, 1.0)
    assert all(grad.count_nonzero() == 0 for grad in unscaled.values())  # what the scale is for
    before = {name: p.detach().clone() for name, p in experts.named_parameters()}
    grads, _ = scaled_step(experts, x, routing, kernel, 2.0**26)
    # The scale is a power of two and rounds nothing: what is left are float16's few roundings of
    # 5e-4. A gradient is a sum over about six tokens of both signs, so that rounding of the largest
    # terms stays where the sum is small: each tensor is compared in units of its largest number.
    for name, grad in grads.items():
        unit = expected[name].abs().max()
        for found in (grad / TINY, before[name] - dict(experts.named_parameters())[name]):
            torch.testing.assert_close(
                found / unit, expected[name] / unit, **TOLERANCES[torch.float16]
            )
