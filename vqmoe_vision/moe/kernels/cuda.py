"""torch's own product of groups: the kernel of CUDA, which never waits for the host.

The ends of the groups stay on the device, forward and backward. It is one kernel in bfloat16 on
compute capability 9 and 10 (H100, H200, B200). Elsewhere torch loops over the groups, and reads
their ends back. It takes no bias, no float64, and no rows that are not a multiple of 16 bytes.

Legend: R rows sorted by expert, E experts.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from .cpu import Groups

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_ALIGNMENT = 16  # bytes
_MOST_EXPERTS = 1023  # that its kernel on a card takes


def fits(device: torch.device, dtype: torch.dtype, shape: Sequence[int]) -> bool:
    """Whether it can compute linear layers of weights of a shape (E, out, in)."""
    known = dtype in DTYPES[: 1 if device.type == 'meta' else None]
    few = device.type != 'cuda' or shape[0] <= _MOST_EXPERTS
    return known and few and all(n * dtype.itemsize % _ALIGNMENT == 0 for n in shape[1:])


def is_fast(device: torch.device, dtype: torch.dtype, shape: Sequence[int]) -> bool:
    """Whether it is one kernel on CUDA that reads nothing back."""
    return dtype == torch.bfloat16 and fits(device, dtype, shape) and _has_kernel(device)


@torch.compiler.assume_constant_result
def _has_kernel(device: torch.device) -> bool:
    # ROCm reports compute capability 9 too, for cards on which this was never tried
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] in (9, 10)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, groups: Groups) -> Tensor:
    """As that of `Kernel`."""
    ends, experts, _, full = groups
    if experts is None:
        rows = torch.arange(x.shape[0], device=x.device, dtype=ends.dtype)
        experts = torch.searchsorted(ends, rows, right=True)  # E for rows past the last end
    out = _product(x, weight, ends, turn_b=True)
    if bias is not None:
        # E is no expert's bias
        of_rows = bias if full else F.pad(bias, (0, 0, 0, 1))
        out += of_rows.index_select(0, experts)
    return out if full else out.masked_fill_((experts == weight.shape[0])[:, None], 0)


def gradients(
    grad: Tensor, x: Tensor, weight: Tensor, groups: Groups, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As those of `Kernel`: torch leaves open rows past the last end, and experts without rows."""
    ends, _, idle, full = groups
    if idle is None:
        idle = ends.diff(prepend=ends.new_zeros(1)) == 0
    grad_x = grad_weight = grad_bias = None
    if wanted[0]:
        grad_x = _product(grad, weight, ends)
        if not full:
            past = torch.arange(x.shape[0], device=x.device) >= ends[-1]
            grad_x.masked_fill_(past[:, None], 0)
    if wanted[1]:
        grad_weight = _product(grad, x, ends, turn_a=True)
        grad_weight.masked_fill_(idle[:, None, None], 0)
    if wanted[2]:
        # a product with ones sums each group alone, in float32 and in a fixed order, which
        # adding rows to their experts would not
        ones = grad.new_ones(grad.shape[0], _ALIGNMENT // grad.element_size())
        sums = _product(ones, grad, ends, turn_a=True)[:, 0]
        grad_bias = sums.masked_fill(idle[:, None], 0)
    return grad_x, grad_weight, grad_bias


def _product(
    a: Tensor, b: Tensor, offsets: Tensor, turn_a: bool = False, turn_b: bool = False
) -> Tensor:
    """`F.grouped_mm` of contiguous tensors, or of them with their last two dimensions exchanged."""
    return (_opaque if torch.compiler.is_compiling() else _torchs)(a, b, offsets, turn_a, turn_b)


def _torchs(a: Tensor, b: Tensor, offsets: Tensor, turn_a: bool, turn_b: bool) -> Tensor:
    # without rows `contiguous()` keeps the strides of an expanded tensor, which it refuses
    if a.numel() == 0:
        return _zeros(a, b, offsets, turn_a, turn_b)
    return F.grouped_mm(a.mT if turn_a else a, b.mT if turn_b else b, offs=offsets)


# Inductor chooses strides for what it hands to torch's operator, and asks only that one of them is
# 1: with 9 rows it stores transposed ones in rows of 18 bytes, which that operator refuses. What it
# hands to an operator of ours is as it was written.
_opaque = torch.library.custom_op('vqmoe_vision::grouped_product', _torchs, mutates_args=())


@_opaque.register_fake
def _zeros(a: Tensor, b: Tensor, offsets: Tensor, turn_a: bool, turn_b: bool) -> Tensor:
    shape = a.shape[-1 if turn_a else -2], b.shape[-2 if turn_b else -1]
    return a.new_zeros(shape if b.ndim == 3 else (offsets.shape[0], *shape))


@register_flop_formula(torch.ops.vqmoe_vision.grouped_product)
def _opaque_flops(
    a: torch.Size, b: torch.Size, _: torch.Size, turn_a: bool, turn_b: bool, **__: Any
) -> int:
    return 2 * math.prod(a) * b[-2 if turn_b else -1]


def _flops(a: torch.Size, b: torch.Size, *_: Any, **__: Any) -> int:
    """From shapes: of (R, in) and (E, in, out), and of (out, R) and (R, in), all rows in groups."""
    return 2 * math.prod(a) * b[-1]


# torch 2.13 counts its own operator as nothing
if torch.ops.aten._grouped_mm not in flop_registry:
    register_flop_formula(torch.ops.aten._grouped_mm)(_flops)
