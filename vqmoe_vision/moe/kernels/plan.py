"""Which row each assignment becomes, when rows stand together by expert.

Legend: A assignments, R rows, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Plan:
    """Where each assignment goes.

    Args:
        order: (R,) int64, the assignment that each row computes; also of rows that only fill a
            group, which no assignment reads.
        inverse: (A,) int64, row of each assignment.
        offsets: (E,) int32, ends of the experts' groups. Rows past the last are those of dropped
            assignments, and not computed.
    """

    order: Tensor
    inverse: Tensor
    offsets: Tensor


def sorted_plan(indices: Tensor, num_experts: int) -> Plan:
    """A row for each assignment and no others. Nothing is read back from the device.

    Args:
        indices: (A,) int64 in [0, E]; E marks an assignment that no expert computes.
        num_experts: E.
    """
    _, order, ends = sort_by_expert(indices, num_experts)
    positions = torch.arange(indices.numel(), device=indices.device)
    return Plan(order, torch.empty_like(order).scatter(0, order, positions), ends)


def sort_by_expert(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Expert and assignment of every row, (A,) each, and int32 ends (E,) of the experts' groups."""
    ranked, order = indices.sort(stable=True)
    experts = torch.arange(num_experts, device=indices.device)
    return ranked, order, torch.searchsorted(ranked, experts, right=True).to(torch.int32)
