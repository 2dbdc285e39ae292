"""Linear layers of all experts on rows that stand together by expert, and which kernel runs them.

It is decided here alone, by device, dtype and widths, or by its name. Dispatch, experts and methods
know plans and `grouped_linear`.

Legend: A assignments, R rows sorted by expert, E experts.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from subprocess import SubprocessError
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import check
from . import cpu, cuda
from .cpu import Groups, Plan, sorted_plan


@dataclass(frozen=True)
class Kernel:
    """Computes the linear layers of all experts. Any kernel takes the plan of any other."""

    # rows (R, in), weight (E, out, in), bias (E, out) or None, of one dtype, and where the rows of
    # each stand, to (R, out), where rows past the last end are zero
    product: Callable[[Tensor, Tensor, Tensor | None, Groups], Tensor]
    # of its gradient, rows, weight, groups, and which are wanted: gradients of rows, weight
    # and bias, anything of those that are not; None where autograd knows the operators of `product`
    gradients: Callable[..., Sequence[Tensor | None]] | None = None
    # of device, dtype and shape of the weight: whether it can compute
    fits: Callable[[torch.device, torch.dtype, Sequence[int]], bool] = lambda *_: True
    # whether it reads the ends back
    ends_on_host: bool = False
    # the rows that suit it, see `make_plan`
    make_plan: Callable[[Tensor, int, torch.dtype, bool], Plan] = lambda indices, e, _, dropped: (
        sorted_plan(indices, e, dropped)
    )


def _one_by_one(x: Tensor, weight: Tensor, bias: Tensor | None, groups: Groups) -> Tensor:
    """One expert after the other in operators that autograd knows: what the others must equal."""
    # for tests and for a doubt: it is slow, and breaks the graph of torch.compile
    ends = groups.ends.tolist()
    answers = [
        F.linear(x[start:end], weight[expert], None if bias is None else bias[expert])
        for expert, (start, end) in enumerate(pairwise([0, *ends]))
    ]
    return torch.cat([*answers, x.new_zeros(x.shape[0] - ends[-1], weight.shape[1])])


@torch.compiler.assume_constant_result
def _has_triton(device: torch.device) -> bool:
    """Whether Triton compiles for a device, or was asked to interpret on the CPU."""
    ours = _triton(device.type)
    return ours is not None and ours.compiles_for(device)


@cache
def _triton(kind: str) -> ModuleType | None:
    # not before it is needed: it imports Triton, which takes a second and is not everywhere
    try:
        from . import triton as ours

        return ours if ours.builds_for(kind) else None
    except ImportError:
        return None  # installed without
    # it wants a C compiler and Python's headers
    except (RuntimeError, OSError, SubprocessError) as error:
        warnings.warn(f'Triton cannot run, so experts wait for the device: {error}', stacklevel=2)
        return None


KERNELS = {
    'reference': Kernel(_one_by_one, ends_on_host=True),
    'batched': Kernel(
        lambda x, weight, bias, groups: cpu.product(x, weight, bias, groups.ends),
        lambda grad, x, weight, groups, wanted: cpu.gradients(grad, x, weight, groups.ends, wanted),
        ends_on_host=True,
        make_plan=cpu.make_plan,
    ),
    'grouped_mm': Kernel(cuda.product, cuda.gradients, cuda.fits),
    'triton': Kernel(
        lambda x, weight, bias, groups: torch.ops.vqmoe_vision.tiled_product(
            x, weight, bias, groups.ends
        ),
        lambda grad, x, weight, groups, wanted: torch.ops.vqmoe_vision.tiled_gradients(
            grad, x, weight, groups.ends, wanted
        ),
        lambda device, dtype, _: dtype in cuda.DTYPES and _has_triton(device),
    ),
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


def make_plan(indices: Tensor, num_experts: int, dtype: torch.dtype, dropped: bool = True) -> Plan:
    """Group assignments (A,) in [0, E] by expert and in their order.

    Of E, which none computes, there are none unless some may be `dropped`.
    """
    # without a name the batched kernel's suits all: on CUDA it is not padded
    return KERNELS[_named or 'batched'].make_plan(indices, num_experts, dtype, dropped)


def even_linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: str | None = None) -> Tensor:
    """As `grouped_linear`, on rows x[e] of (E, S, in), as many for each."""
    if _named is not None:
        ends = x.shape[1] * torch.arange(1, len(x) + 1, device=x.device, dtype=torch.int32)
        rows = grouped_linear(x.flatten(0, 1), weight, bias, Groups(ends), gelu)
        return rows.view(*x.shape[:2], -1)
    dtype = compute_dtype(x)
    bias = None if bias is None else bias.to(dtype)
    # graphs that are exported or traced know no function of ours
    plain = torch.jit.is_tracing() or not torch.is_grad_enabled()
    run = _even_linear if plain else _EvenLinear.apply
    return run(x.to(dtype), weight.to(dtype), bias, gelu)


def _even_linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: str | None) -> Tensor:
    x = x if gelu is None else F.gelu(x, approximate=gelu)
    if bias is None:
        return torch.bmm(x, weight.mT)
    return torch.baddbmm(bias[:, None], x, weight.mT)


class _EvenLinear(torch.autograd.Function):
    """Without autograd's gradient of `weight.mT`, which it copies as a whole."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gelu: str | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.gelu = gelu
        return _even_linear(x, weight, bias, gelu)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        (x, weight), grad, gelu = ctx.saved_tensors, grads[0], ctx.gelu
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        grad_x = grad_weight = None
        if wants_weight:
            rows = x if gelu is None else F.gelu(x, approximate=gelu)
            grad_weight = torch.bmm(grad.mT, rows)
        if wants_x:
            grad_x = torch.bmm(grad, weight)
            if gelu is not None:
                grad_x = torch.ops.aten.gelu_backward(grad_x, x, approximate=gelu)
        return grad_x, grad_weight, grad.sum(dim=1) if wants_bias else None, None


def placed(groups: Groups, x: Tensor, shape: Sequence[int]) -> Groups:
    """Ends where the kernel of weights (E, out, in) on rows `x` wants them: read once at most."""
    chosen = KERNELS[kernel_of(x.device, compute_dtype(x), shape)]
    # on meta, where operations are counted, there is nothing to read
    on_host = chosen.ends_on_host and not groups.ends.is_meta
    return groups._replace(ends=groups.ends.cpu()) if on_host else groups


def grouped_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, groups: Groups, gelu: str | None = None
) -> Tensor:
    """Linear layer e of weight (E, out, in) on rows ends[e - 1]:ends[e] of (R, in).

    Autocast included; rows past the last end give zero. Returns (R, out). With `gelu`, how it is
    approximated, of GELU's answers for the rows, which the backward pass computes again.
    """
    dtype = compute_dtype(x)
    x, weight = x.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype).contiguous()
    name = kernel_of(x.device, dtype, weight.shape)
    # a trace of torch.jit holds operators, and no function of Python can be saved
    if (kernel := KERNELS[name]).gradients is None or torch.jit.is_tracing():
        x = x if gelu is None else F.gelu(x, approximate=gelu)
        return kernel.product(x, weight, bias, groups)
    ends, *others, full = groups
    if not kernel.ends_on_host:
        ends = ends.to(x.device)
    x, weight, how = x.contiguous(), weight.contiguous(), (name, gelu, full)
    return _GroupedLinear.apply(x, weight, bias, how, ends, *others)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, how: tuple, *parts: Any
    ) -> Tensor:
        ctx.save_for_backward(x, weight, *parts)
        ctx.kernel, ctx.gelu, ctx.full = how
        x = x if ctx.gelu is None else F.gelu(x, approximate=ctx.gelu)
        return KERNELS[ctx.kernel].product(x, weight, bias, Groups(*parts)._replace(full=ctx.full))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        x, weight, *parts = ctx.saved_tensors
        groups = Groups(*parts)._replace(full=ctx.full)
        wanted = list(ctx.needs_input_grad[:3])
        # only the gradient of a weight asks for them
        again = ctx.gelu is not None and wanted[1]
        rows = F.gelu(x, approximate=ctx.gelu) if again else x
        # of a sum it is one expanded number
        grad, gradients = grads[0].contiguous(), KERNELS[ctx.kernel].gradients
        assert gradients is not None
        found = [
            g if w else None
            for g, w in zip(gradients(grad, rows, weight, groups, wanted), wanted, strict=True)
        ]
        if found[0] is not None and ctx.gelu is not None:
            found[0] = torch.ops.aten.gelu_backward(found[0], x, approximate=ctx.gelu)
        return *found, None, *(None for _ in parts)


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


def kernel_of(device: torch.device, dtype: torch.dtype, shape: Sequence[int]) -> str:
    """Key of `KERNELS` that runs linear layers of weights (E, out, in); the one that was named."""
    if _named is not None:
        experts, *widths = shape
        allowed = f'one that computes {experts} experts in {dtype} on {device.type}, width {widths}'
        check(KERNELS[_named].fits(device, dtype, shape), 'kernel', _named, allowed)
        return _named
    if device.type != 'cuda':
        return 'batched'
    if cuda.is_fast(device, dtype, shape):
        return 'grouped_mm'
    return 'triton' if KERNELS['triton'].fits(device, dtype, shape) else 'batched'
