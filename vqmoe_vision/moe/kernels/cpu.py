"""Rows by expert, and one batched product of neighbours with as many rows each: on CPUs.

It also runs what no other kernel takes on CUDA, for which ends are read back once a plan.

On a CPU the groups are padded where that is faster. Neighbours of similar load get the size of the
largest: a product per expert is too small to keep two threads busy. Below float32 all groups get
whole blocks of rows: oneDNN compiles a kernel for each new number of rows, at ten times the cost of
running it. A row that fills a group repeats a row of that group: a token that is not finite spoils
no other expert.

Legend: A assignments, R rows, E experts.
"""

from collections.abc import Iterator
from itertools import accumulate, groupby, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

# Measured constants. docs/archive/performance.md
# says on which processor each was chosen.

# Rows in a block below float32: AMX works on tiles of 16 rows, two at a time; AVX-512 on any.
_AMX_BLOCK, _BLOCK = 32, 8
# Blocks double where a group has more of them.
_MOST_BLOCKS = 128
# How many neighbours to try to give one size, one after the other: in float32, below it, with AMX.
# Pairs fill less, and without AMX a product of two is as fast as one of eight.
_ALL = 0
_RUNS, _LOW_RUNS, _AMX_RUNS = (_ALL, 2), (2,), (_ALL,)
# What products for each expert cost over one for all, in rows per expert computed for nothing: on
# several threads, on one, with AMX. AMX, whose products are fast, loses most by small ones; without
# it one thread loses nothing.
_SPARE, _SPARE_ALONE, _AMX_SPARE = 32, 0, 50
# With AMX and several threads one row more in so many.
_AMX_SHARE = 12
# At most one row in so many, which bounds the length of a compiled plan.
_MOST_SPARE = 4

_HAS_AMX = torch.cpu._is_amx_tile_supported()  # nothing public says so before torch 2.13


class Groups(NamedTuple):
    """Where the rows of each expert stand, and what else a plan has found out on its way."""

    ends: Tensor  # (E,) int32; rows past the last are dropped and not computed
    experts: Tensor | None = None  # (R,) int32, of every row; E past the last end
    idle: Tensor | None = None  # (E,) bool, which have no rows
    full: bool = False  # whether no row is past the last end, as far as the host knows


class Plan(NamedTuple):
    """Which row each assignment becomes."""

    order: Tensor  # (R,) int64, the assignment of each row; also of rows that only fill a group
    inverse: Tensor  # (A,) int64, row of each assignment
    groups: Groups


def make_plan(indices: Tensor, num_experts: int, dtype: torch.dtype, dropped: bool = True) -> Plan:
    """As `kernels.make_plan`: padded on the CPU."""
    if indices.device.type != 'cpu':
        return sorted_plan(indices, num_experts, dropped)
    low, length = dtype in (torch.bfloat16, torch.float16), 0
    block = (_AMX_BLOCK if _HAS_AMX else _BLOCK) if low else 1
    if torch.compiler.is_compiling():
        # an argument, so that a graph that was cached by another version keeps its own length
        length = _most_rows(indices.shape[0], num_experts, block)
    order, inverse, ends = _padded_plan(indices, num_experts, block, length)
    return Plan(order, inverse, Groups(ends))


def sorted_plan(indices: Tensor, num_experts: int, dropped: bool = True) -> Plan:
    """A row for each assignment (A,) in [0, E] and no others; nothing is read back."""
    ranked, order, bounds = _sort_by_expert(indices, num_experts)
    positions = torch.arange(indices.numel(), device=indices.device)
    inverse = torch.empty_like(order).scatter_(0, order, positions)
    starts, ends = bounds[:-1], bounds[1:]
    return Plan(order, inverse, Groups(ends, ranked.int(), starts == ends, not dropped))


def _sort_by_expert(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Expert and assignment of every row, (A,) each; bounds (E + 1,) int32 of the groups."""
    # keys of one byte sort several times faster, E too is one
    dtype = torch.uint8 if num_experts < 256 else torch.int64
    ranked, order = indices.to(dtype).sort(stable=True)
    experts = torch.arange(num_experts + 1, dtype=dtype, device=indices.device)
    return ranked, order, torch.searchsorted(ranked, experts, out_int32=True)


# One opaque operator: what is decided by the load here makes no graph of torch.compile break.
@torch.library.custom_op('vqmoe_vision::padded_plan', mutates_args=())
def _padded_plan(
    indices: Tensor, num_experts: int, block: int, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Order, inverse and offsets; the order has `length`, or if that is 0 what this load needs."""
    num_assignments = indices.shape[0]
    ranked, order, bounds = _sort_by_expert(indices, num_experts)
    counted = bounds.tolist()
    starts, ends = counted[:-1], counted[1:]
    sizes = _group_sizes([e - s for s, e in zip(starts, ends, strict=True)], block)
    padded_starts = [0, *accumulate(sizes)]
    # dropped assignments come after the last group
    shift = torch.tensor([p - s for p, s in zip(padded_starts, [*starts, ends[-1]], strict=True)])
    rows = torch.arange(num_assignments) + shift.index_select(0, ranked.int())
    inverse = torch.empty_like(order).scatter_(0, order, rows)
    num_rows = num_assignments - ends[-1] + padded_starts[-1]
    assert length == 0 or num_rows <= length
    padded = order.new_zeros(length or num_rows)
    if padded_starts[-1] > ends[-1]:  # no group is empty that has rows to fill
        firsts = order[torch.tensor(starts).clamp_(max=num_assignments - 1)]
        padded[: padded_starts[-1]] = firsts.repeat_interleave(torch.tensor(sizes))
    padded.scatter_(0, rows, order)
    return padded, inverse, torch.tensor(padded_starts[1:], dtype=torch.int32)


def _group_sizes(loads: list[int], block: int) -> list[int]:
    sizes = [_whole_blocks(load, block) for load in loads]
    several = torch.get_num_threads() > 1
    # how many neighbours to give one size: all experts, pairs, or all and else pairs
    for most in _AMX_RUNS if block == _AMX_BLOCK else (_RUNS if block == 1 else _LOW_RUNS):
        length = most or len(loads)
        for i in range(0, len(loads), length):
            run, load = sizes[i : i + length], loads[i : i + length]
            spare = _spare_rows(sum(load), len(run), block, several)
            # an empty group has no row of its own to repeat
            if min(load) > 0 and len(run) * max(run) - sum(load) <= spare:
                sizes[i : i + length] = [max(run)] * len(run)
    return sizes


def _whole_blocks(load: int, block: int) -> int:
    """At least `load`, of few different sizes: blocks double with every octave of longer loads."""
    # kernels of a few hundred sizes are kept, of thousands they would be compiled again and again
    while 1 < block < load / _MOST_BLOCKS:
        block *= 2
    return -(-load // block) * block


def _spare_rows(num_assignments: int, num_experts: int, block: int, several: bool) -> int:
    """Rows that may be computed for nothing, on one thread or `several`."""
    if block == _AMX_BLOCK:
        spare = _AMX_SPARE * num_experts + (num_assignments // _AMX_SHARE if several else 0)
    else:
        spare = (_SPARE if several else _SPARE_ALONE) * num_experts
    # Python's `min` would make torch.export ask which one it is
    return torch.sym_min(num_assignments // _MOST_SPARE, spare)


def _most_rows(num_assignments: int, num_experts: int, block: int) -> int:
    """As many rows as any load may need; an expression that tracing keeps for any batch size."""
    spare = _spare_rows(num_assignments, num_experts, block, several=True)
    # a group gets less than a block more, or less than this share of a load with larger blocks
    share = num_assignments // (_MOST_BLOCKS // 2) if block > 1 else 0
    return num_assignments + spare + num_experts * (block - 1) + share


@_padded_plan.register_fake
def _(indices: Tensor, num_experts: int, block: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    # compared with a number: a symbolic length is never 0, and no condition of the graph
    eager = isinstance(length, int) and length == 0
    order = indices.new_empty(torch.library.get_ctx().new_dynamic_size() if eager else length)
    return order, torch.empty_like(indices), indices.new_empty(num_experts, dtype=torch.int32)


# One opaque operator, so that torch.compile and torch.export see no data-dependent shape and
# never recompile when the routing changes. Ends are read, which no CUDA graph can record:
# `mode='reduce-overhead'` runs it between two of them.
CUDAGRAPH_UNSAFE = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op('vqmoe_vision::grouped_linear', mutates_args=(), tags=CUDAGRAPH_UNSAFE)
def product(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    """As that of `Kernel`."""
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


product.register_fake(lambda x, weight, *_: x.new_empty(x.shape[0], weight.shape[1]))


@register_flop_formula(torch.ops.vqmoe_vision.grouped_linear)
def _flops(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    """Of the forward pass, for torch's `FlopCounterMode`, from shapes."""
    return 2 * x[0] * weight[1] * weight[2]


@torch.library.custom_op(
    'vqmoe_vision::grouped_linear_backward', mutates_args=(), tags=CUDAGRAPH_UNSAFE
)
def gradients(
    grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """As those of `Kernel`; of frozen ones an empty tensor."""
    grads = _empty_grads(grad, x, weight, offsets, wanted)
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


@gradients.register_fake
def _empty_grads(
    grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
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
