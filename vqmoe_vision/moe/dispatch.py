"""Sending tokens to experts and putting the answers together.

Legend: T tokens, K experts per token, A = T * K assignments, R = A rows sorted by expert,
E experts, D width.

Dropless and exact: one stable sort by expert, int32 group ends, a gather, two grouped linear
layers, and a weighted sum through the inverse permutation. Nothing here knows how a token was
routed. `run_experts_loop` is the same computation as a plain loop: the oracle of the tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .experts import Experts

ROW_BLOCK = 64  # rows


@dataclass(frozen=True)
class Plan:
    """Where each assignment goes.

    Args:
        order: (A,) int64, assignment that sits in each sorted row.
        inverse: (A,) int64, sorted row of each assignment.
        offsets: (E,) int32, ends of the experts' groups. Rows past the last end were dropped.
    """

    order: Tensor
    inverse: Tensor
    offsets: Tensor


def make_plan(indices: Tensor, num_experts: int) -> Plan:
    """Sort assignments by expert, without reading anything back from the device.

    Args:
        indices: (A,) int64 in [0, E]; E marks an assignment that no expert computes.
        num_experts: E.
    """
    ranked, order = indices.sort(stable=True)
    positions = torch.arange(indices.numel(), device=indices.device)
    inverse = torch.empty_like(order).scatter(0, order, positions)
    experts = torch.arange(num_experts, device=indices.device)
    offsets = torch.searchsorted(ranked, experts, right=True).to(torch.int32)
    return Plan(order, inverse, offsets)


def run_experts(
    experts: Experts, x: Tensor, indices: Tensor, weights: Tensor, kept: Tensor | None = None
) -> Tensor:
    """Weighted sum of the chosen experts' answers.

    Args:
        experts: The layer's experts.
        x: Tokens (T, D).
        indices: (T, K) int64 in [0, E).
        weights: (T, K).
        kept: (T, K) bool; assignments marked False contribute nothing and are not computed.

    Returns:
        (T, D) in the dtype that the experts compute in.
    """
    k = indices.shape[1]
    flat = indices if kept is None else indices.masked_fill(~kept, experts.num_experts)
    plan = make_plan(flat.reshape(-1), experts.num_experts)
    rows = experts(x.to(compute_dtype(x))[plan.order // k], plan.offsets)
    return combine(rows, plan.inverse.view(-1, k), weights)


def combine(rows: Tensor, positions: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum over K of the rows at `positions`.

    Args:
        rows: (R, D).
        positions: (T, K) int64.
        weights: (T, K), cast to the rows' dtype.

    Returns:
        (T, D).
    """
    if positions.shape[1] == 1:
        return rows[positions.squeeze(1)] * weights.to(rows.dtype)
    # forward and backward in one pass each, 1.3 to 2 times faster than gather and sum on CPU
    return F.embedding_bag(positions, rows, per_sample_weights=weights.to(rows.dtype), mode='sum')


def run_experts_loop(
    experts: Experts, x: Tensor, indices: Tensor, weights: Tensor, kept: Tensor | None = None
) -> Tensor:
    """Same as `run_experts`, one expert after the other; slow, plain, the tests' oracle."""
    weights = weights if kept is None else weights * kept
    out = torch.zeros_like(x)
    fc1, fc2 = experts.fc1, experts.fc2
    for e in range(experts.num_experts):
        token, choice = torch.nonzero(indices == e, as_tuple=True)
        hidden = F.linear(x[token], fc1.weight[e], None if fc1.bias is None else fc1.bias[e])
        answer = F.linear(
            experts.act(hidden), fc2.weight[e], None if fc2.bias is None else fc2.bias[e]
        )
        out = out.index_add(0, token, answer * weights[token, choice, None].to(answer.dtype))
    return out


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


def _setup_context(ctx, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, offsets = inputs
    ctx.save_for_backward(x, weight, offsets)
    ctx.has_bias = bias is not None


def _backward(ctx, grad: Tensor) -> tuple:
    x, weight, offsets = ctx.saved_tensors
    # sums of the output arrive as expanded tensors, which mm(out=) takes but slowly
    grads = torch.ops.vqmoe_vision.grouped_linear_backward(grad.contiguous(), x, weight, offsets)
    grad_x, grad_weight, grad_bias = grads
    return grad_x, grad_weight, grad_bias if ctx.has_bias else None, None


_grouped_linear.register_autograd(_backward, setup_context=_setup_context)
