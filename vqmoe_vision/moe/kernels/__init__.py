"""Linear layers of all experts on rows that stand together by expert, and which kernel runs them.

It is decided here alone, by device, dtype and widths, or by its name. Dispatch, experts and methods
know plans and `grouped_linear`.

Legend: A assignments, R rows sorted by expert, E experts.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import check
from . import cpu, cuda
from .cpu import Plan, sorted_plan


@dataclass(frozen=True)
class Kernel:
    """Computes the linear layers of all experts. Any kernel takes the plan of any other."""

    # rows (R, in), weight (E, out, in), bias (E, out) or None, of one dtype, and ends (E,) int32 to
    # (R, out), where rows past the last end are zero
    grouped_linear: Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]
    # of rows and weight: whether it can compute
    fits: Callable[[Tensor, Tensor], bool] = lambda x, weight: True
    # the rows that suit it, see `make_plan`
    make_plan: Callable[[Tensor, int, torch.dtype], Plan] = lambda indices, e, _: sorted_plan(
        indices, e
    )


def _one_by_one(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    """One expert after the other in operators that autograd knows: what the others must equal."""
    # for tests and for a doubt: it is slow, and breaks the graph of torch.compile
    ends = offsets.tolist()
    answers = [
        F.linear(x[start:end], weight[expert], None if bias is None else bias[expert])
        for expert, (start, end) in enumerate(pairwise([0, *ends]))
    ]
    return torch.cat([*answers, x.new_zeros(x.shape[0] - ends[-1], weight.shape[1])])


KERNELS = {
    'reference': Kernel(_one_by_one),
    'batched': Kernel(cpu.grouped_linear, make_plan=cpu.make_plan),
    'grouped_mm': Kernel(cuda.grouped_linear, cuda.fits),
}
_named: str | None = None


@contextmanager
def use_kernel(name: str) -> Iterator[None]:
    """Run all experts by one kernel inside the block, in all threads; for tests and measurements.

    A backward pass is that of the kernel which ran forward, wherever it is called.

    Args:
        name: Key of `KERNELS`.

    Raises:
        ValueError: There is no such kernel. Experts that it cannot run raise one when called, as do
            separate ones and those of an export.
    """
    global _named
    check(name in tuple(KERNELS), 'kernel', name, f'one of {", ".join(KERNELS)}')
    before, _named = _named, name
    try:
        yield
    finally:
        _named = before


def make_plan(indices: Tensor, num_experts: int, dtype: torch.dtype) -> Plan:
    """Group assignments (A,) in [0, E], where none computes E, by expert and in their order."""
    # without a name the batched kernel's suits all: on CUDA it is not padded
    return KERNELS[_named or 'batched'].make_plan(indices, num_experts, dtype)


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    """Linear layer e of weight (E, out, in) on rows offsets[e - 1]:offsets[e] of (R, in).

    Autocast included; rows past the last end give zero. Returns (R, out).
    """
    dtype = compute_dtype(x)
    x, weight = x.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    return _chosen(x, weight).grouped_linear(x, weight, bias, offsets)


def refuse_named(where: str) -> None:
    """Raise `ValueError` if a kernel was named where none runs; `where` is that, in words."""
    check(_named is None, 'kernel', _named, f'leave use_kernel out, no kernel runs {where}')


def compute_dtype(x: Tensor) -> torch.dtype:
    """Dtype in which a linear layer would compute on `x`: autocast's, or the tensor's own."""
    kind = x.device.type
    # autocast leaves float64 alone
    if kind != 'meta' and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def _chosen(x: Tensor, weight: Tensor) -> Kernel:
    if _named is None:
        return KERNELS['grouped_mm' if cuda.is_fast(x, weight) else 'batched']
    experts, *widths = weight.shape
    allowed = f'one that computes {experts} experts in {x.dtype} on {x.device.type}, width {widths}'
    check(KERNELS[_named].fits(x, weight), 'kernel', _named, allowed)
    return KERNELS[_named]
