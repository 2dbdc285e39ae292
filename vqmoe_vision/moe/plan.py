"""Which row each assignment becomes, when rows stand together by expert.

On CPU the groups of rows are padded where that is faster. If the load is near even, all groups get
the size of the largest, and one batched product runs all experts: a product per expert is too small
to keep two threads busy. If it is not, groups below float32 get whole blocks of rows: oneDNN
compiles a kernel for each number of rows that it has not seen lately, ten times the cost of running
it, and routing gives new numbers at every step. docs/performance.md has the measurements.

Legend: A assignments, R rows, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ROW_BLOCK = 32  # rows; 16 is 5 % slower on AMX, 64 wastes more than it saves


@dataclass(frozen=True)
class Plan:
    """Where each assignment goes.

    Args:
        order: (R,) int64, the assignment that each row computes. Rows that only fill a group name
            an assignment too, but no assignment reads them.
        inverse: (A,) int64, row of each assignment.
        offsets: (E,) int32, ends of the experts' groups. Rows past the last end are not computed:
            those of assignments that were dropped.
    """

    order: Tensor
    inverse: Tensor
    offsets: Tensor


def make_plan(indices: Tensor, num_experts: int, dtype: torch.dtype) -> Plan:
    """Group assignments by expert, each group in the order of the assignments.

    Nothing is read back from a device other than the CPU.

    Args:
        indices: (A,) int64 in [0, E]; E marks an assignment that no expert computes.
        num_experts: E.
        dtype: In which the experts compute.
    """
    if indices.device.type == 'cpu':
        block = ROW_BLOCK if dtype in (torch.bfloat16, torch.float16) else 1
        static = torch.compiler.is_compiling()
        return Plan(*_padded_plan(indices, num_experts, block, static))
    _, order, ends = _sort(indices, num_experts)
    positions = torch.arange(indices.numel(), device=indices.device)
    return Plan(order, torch.empty_like(order).scatter(0, order, positions), ends)


def _sort(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Expert and assignment of every row, unpadded, and the int32 ends of the groups."""
    ranked, order = indices.sort(stable=True)
    experts = torch.arange(num_experts, device=indices.device)
    return ranked, order, torch.searchsorted(ranked, experts, right=True).to(torch.int32)


# One opaque operator: what is decided by the load here makes no graph of torch.compile break.
@torch.library.custom_op('vqmoe_vision::padded_plan', mutates_args=())
def _padded_plan(
    indices: Tensor, num_experts: int, block: int, static: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Order, inverse and offsets; with `static`, the order is as long as any load may need."""
    ranked, order, ends = _sort(indices, num_experts)
    ends = F.pad(ends, (1, 0))
    dropped = indices.shape[0] - int(ends[-1])
    sizes = _group_sizes(ends.diff().tolist(), block)
    offsets = torch.tensor(sizes, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    # dropped assignments come after the last group
    shift = F.pad(offsets, (1, 0)) - ends
    rows = torch.arange(indices.shape[0]) + shift[ranked]
    inverse = torch.empty_like(order).scatter_(0, order, rows)
    num_rows = int(offsets[-1]) + dropped
    if static:
        num_rows = _most_rows(indices.shape[0], num_experts, block)
    return order.new_zeros(num_rows).scatter_(0, rows, order), inverse, offsets


def _group_sizes(loads: list[int], block: int) -> list[int]:
    sizes = [-(-load // block) * block for load in loads]
    even = [max(sizes)] * len(sizes)
    # at most a quarter, which bounds the length of a compiled plan
    spare = min(_spare_rows(loads, block), sum(loads) // 4)
    return even if sum(even) <= sum(sizes) + spare else sizes


def _spare_rows(loads: list[int], block: int) -> int:
    """What a product for each expert costs over one for all, in rows computed for nothing.

    Measured; one thread loses nothing in float32, several lose most where products are fast.
    """
    several = torch.get_num_threads() > 1
    if block == 1:
        return 32 * len(loads) if several else 0
    return 50 * len(loads) + (sum(loads) // 6 if several else 0)


def _most_rows(num_assignments: int, num_experts: int, block: int) -> int:
    """As many rows as any load may need; an expression that tracing keeps for any batch size."""
    return num_assignments + num_assignments // 4 + num_experts * (block - 1)


@_padded_plan.register_fake
def _(indices: Tensor, num_experts: int, block: int, static: bool) -> tuple[Tensor, Tensor, Tensor]:
    most = _most_rows(indices.shape[0], num_experts, block)
    order = indices.new_empty(most if static else torch.library.get_ctx().new_dynamic_size())
    return order, torch.empty_like(indices), indices.new_empty(num_experts, dtype=torch.int32)
