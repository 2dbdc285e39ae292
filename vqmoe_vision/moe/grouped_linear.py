"""Linear layers of all experts as one operator on rows sorted by expert.

Legend: R rows sorted by expert, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROW_BLOCK = 64  # rows


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
    start = 0
    for e, end in enumerate(offsets.tolist()):
        if end > start:
            rows, matrix = _group(x, start, end), weight[e].t()
            _product(out[start:end], rows, matrix, None if bias is None else bias[e])
        start = end
    out[start:] = 0
    return out


def _group(rows: Tensor, start: int, end: int) -> Tensor:
    """Rows of one expert; below float32 on CPU with zero rows up to a multiple of ROW_BLOCK.

    oneDNN compiles a kernel for each shape that it has not seen lately, ten times the cost of
    running it, and routing gives new shapes at every step. Blocks leave only a few.
    """
    if rows.device.type != 'cpu' or rows.dtype not in (torch.bfloat16, torch.float16):
        return rows[start:end]
    return F.pad(rows[start:end], (0, 0, 0, (start - end) % ROW_BLOCK))


def _product(out: Tensor, rows: Tensor, matrix: Tensor, bias: Tensor | None = None) -> None:
    """Write rows @ matrix + bias into out, without the rows that `_group` added."""
    if len(rows) > len(out):
        product = rows @ matrix if bias is None else torch.addmm(bias, rows, matrix)
        out.copy_(product[: len(out)])
    elif bias is None:
        torch.mm(rows, matrix, out=out)
    else:
        torch.addmm(bias, rows, matrix, out=out)


@_grouped_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op('vqmoe_vision::grouped_linear_backward', mutates_args=())
def _grouped_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
    grad_bias = weight.new_zeros(weight.shape[:2])
    start = 0
    for e, end in enumerate(offsets.tolist()):
        if end > start:
            rows = _group(grad, start, end)
            _product(grad_x[start:end], rows, weight[e])
            torch.mm(rows.t(), _group(x, start, end), out=grad_weight[e])
            torch.sum(rows, dim=0, out=grad_bias[e])
        else:
            grad_weight[e] = 0
        start = end
    grad_x[start:] = 0
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
