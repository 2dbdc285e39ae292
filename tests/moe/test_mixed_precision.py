"""Experts in float32 under autocast, by every kernel."""

import pytest
import torch

from vqmoe_vision.moe import dispatch
from vqmoe_vision.moe.kernels import KERNELS, use_kernel

from .naive_experts import TOLERANCES, assert_same, make_case, naive, run_and_backward

LOW = [torch.bfloat16, torch.float16]


def require(kernel, x, weight, dtype):
    """Leaves out what a test of its own sees refused: widths."""
    if not KERNELS[kernel].fits(x.to(dtype), weight.to(dtype)):
        pytest.skip('widths')


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
