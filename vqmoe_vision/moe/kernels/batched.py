"""Neighbours with as many rows each are one batched product: the kernel of CPUs.

It also runs what `grouped_mm` does not take on CUDA, where it waits for the ends of the groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .kernel import Kernel
from .padded_plan import padded_plan
from .plan import Plan, sorted_plan


def _make_plan(indices: Tensor, num_experts: int, dtype: torch.dtype) -> Plan:
    if indices.device.type == 'cpu':
        return padded_plan(indices, num_experts, dtype)
    return sorted_plan(indices, num_experts)


# One opaque operator, so that torch.compile and torch.export see no data-dependent shape and
# never recompile when the routing changes. On CUDA it reads back, which no CUDA graph can record:
# `mode='reduce-overhead'` runs it between two of them.
_TAGS = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op('vqmoe_vision::grouped_linear', mutates_args=(), tags=_TAGS)
def _grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    out = x.new_empty(x.shape[0], weight.shape[1])
    ends = offsets.tolist()
    for experts, rows, size in _even_runs(ends):
        inputs, result = x[rows].unflatten(0, size), out[rows].unflatten(0, size)
        if bias is None:
            torch.bmm(inputs, weight[experts].mT, out=result)
        else:
            torch.baddbmm(bias[experts, None], inputs, weight[experts].mT, out=result)
    out[ends[-1] :] = 0
    return out


def _even_runs(ends: list[int]) -> Iterator[tuple[slice, slice, tuple[int, int]]]:
    """Neighbours with as many rows each: experts, all their rows, and (experts, rows of each)."""
    expert = row = 0
    for size, run in groupby(end - start for start, end in pairwise([0, *ends])):
        count = len(list(run))
        yield slice(expert, expert + count), slice(row, row + count * size), (count, size)
        expert, row = expert + count, row + count * size


@_grouped_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@register_flop_formula(torch.ops.vqmoe_vision.grouped_linear)
def _flops(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    """Of the forward pass, for torch's `FlopCounterMode`, from shapes."""
    return 2 * x[0] * weight[1] * weight[2]


@torch.library.custom_op('vqmoe_vision::grouped_linear_backward', mutates_args=(), tags=_TAGS)
def _grouped_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of rows, weight and bias; of frozen ones an empty tensor."""
    grads = _empty_grads(x, weight, wanted)
    grad_x, grad_weight, grad_bias = grads
    ends = offsets.tolist()
    for experts, rows, size in _even_runs(ends):
        of_run = grad[rows].unflatten(0, size)
        if wanted[0]:
            torch.bmm(of_run, weight[experts], out=grad_x[rows].unflatten(0, size))
        if wanted[1]:
            torch.bmm(of_run.mT, x[rows].unflatten(0, size), out=grad_weight[experts])
        if wanted[2]:
            torch.sum(of_run, dim=1, out=grad_bias[experts])
    if wanted[0]:
        grad_x[ends[-1] :] = 0
    return grads


def _empty_grads(x: Tensor, weight: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (x.shape, weight.shape, weight.shape[:2])
    made = [x.new_empty(s if w else (0,)) for s, w in zip(shapes, wanted, strict=True)]
    return made[0], made[1], made[2]


@register_flop_formula(torch.ops.vqmoe_vision.grouped_linear_backward)
def _backward_flops(
    grad: torch.Size,
    x: torch.Size,
    weight: torch.Size,
    offsets: torch.Size,
    wanted: list[bool],
    **_: Any,
) -> int:
    return 2 * x[0] * weight[1] * weight[2] * sum(wanted[:2])


@_grouped_linear_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_grads(x, weight, wanted)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, _, offsets = inputs
    ctx.save_for_backward(x, weight, offsets)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    x, weight, offsets = ctx.saved_tensors
    # sums of the output arrive as expanded tensors, which mm(out=) takes but slowly
    grads = torch.ops.vqmoe_vision.grouped_linear_backward(
        grad.contiguous(), x, weight, offsets, list(ctx.needs_input_grad[:3])
    )
    return *(g if w else None for g, w in zip(grads, ctx.needs_input_grad, strict=False)), None


_grouped_linear.register_autograd(_backward, setup_context=_setup_context)

BATCHED = Kernel(_grouped_linear, make_plan=_make_plan)
