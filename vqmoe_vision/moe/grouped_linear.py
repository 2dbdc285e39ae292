"""Linear layers of all experts as one operator on rows sorted by expert.

Legend: R rows sorted by expert, E experts.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """Dtype in which a linear layer would compute on `x`: autocast's, or the tensor's own."""
    kind = x.device.type
    if kind != 'meta' and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    """Linear layer e on rows offsets[e - 1]:offsets[e], autocast included.

    Args:
        x: (R, in).
        weight: (E, out, in).
        bias: (E, out) or None.
        offsets: (E,) int32, ascending; rows past the last end give zero.

    Returns:
        (R, out).
    """
    dtype = compute_dtype(x)
    bias = None if bias is None else bias.to(dtype)
    return _grouped_linear(x.to(dtype), weight.to(dtype), bias, offsets)


# One opaque operator, so that torch.compile and torch.export see no data-dependent shape and
# never recompile when the routing changes.
@torch.library.custom_op('vqmoe_vision::grouped_linear', mutates_args=())
def _grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    out = x.new_empty(x.shape[0], weight.shape[1])
    ends = offsets.tolist()
    if _are_even(ends):
        product = _batched(out, ends)
        if bias is None:
            torch.bmm(_batched(x, ends), weight.mT, out=product)
        else:
            torch.baddbmm(bias[:, None], _batched(x, ends), weight.mT, out=product)
    else:
        for e, (start, end) in enumerate(pairwise([0, *ends])):
            if bias is None:
                torch.mm(x[start:end], weight[e].t(), out=out[start:end])
            else:
                torch.addmm(bias[e], x[start:end], weight[e].t(), out=out[start:end])
    out[ends[-1] :] = 0
    return out


def _are_even(ends: list[int]) -> bool:
    """Whether all experts have as many rows, so that one batched product runs them all."""
    return all(end == (e + 1) * ends[0] for e, end in enumerate(ends))


def _batched(rows: Tensor, ends: list[int]) -> Tensor:
    """View of the computed rows with one entry per expert."""
    return rows[: ends[-1]].unflatten(0, (len(ends), ends[0]))


@_grouped_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op('vqmoe_vision::grouped_linear_backward', mutates_args=())
def _grouped_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
    grad_bias = weight.new_empty(weight.shape[:2])
    ends = offsets.tolist()
    if _are_even(ends):
        rows = _batched(grad, ends)
        torch.bmm(rows, weight, out=_batched(grad_x, ends))
        torch.bmm(rows.mT, _batched(x, ends), out=grad_weight)
        torch.sum(rows, dim=1, out=grad_bias)
    else:
        for e, (start, end) in enumerate(pairwise([0, *ends])):
            rows = grad[start:end]
            torch.mm(rows, weight[e], out=grad_x[start:end])
            torch.mm(rows.t(), x[start:end], out=grad_weight[e])
            torch.sum(rows, dim=0, out=grad_bias[e])
    grad_x[ends[-1] :] = 0
    return grad_x, grad_weight, grad_bias


@_grouped_linear_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), weight.new_empty(weight.shape[:2])


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, offsets = inputs
    ctx.save_for_backward(x, weight, offsets)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple:
    x, weight, offsets = ctx.saved_tensors
    # sums of the output arrive as expanded tensors, which mm(out=) takes but slowly
    grads = torch.ops.vqmoe_vision.grouped_linear_backward(grad.contiguous(), x, weight, offsets)
    grad_x, grad_weight, grad_bias = grads
    return grad_x, grad_weight, grad_bias if ctx.has_bias else None, None


_grouped_linear.register_autograd(_backward, setup_context=_setup_context)
