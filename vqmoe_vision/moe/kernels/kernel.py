"""What a kernel is.

Legend: A assignments, R rows sorted by expert, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .plan import Plan, sorted_plan


@dataclass(frozen=True)
class Kernel:
    """Computes the linear layers of all experts. Any kernel takes the plan of any other."""

    # rows (R, in), weight (E, out, in), bias (E, out) or None, of one dtype, and ends (E,) int32 to
    # (R, out), where rows past the last end are zero
    grouped_linear: Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]
    # of rows and weight: why it cannot compute, None if it can
    misfit: Callable[[Tensor, Tensor], str | None] = lambda x, weight: None
    # the rows that suit it, see `choice.make_plan`
    make_plan: Callable[[Tensor, int, torch.dtype], Plan] = field(default_factory=lambda: _sorted)


def _sorted(indices: Tensor, num_experts: int, dtype: torch.dtype) -> Plan:
    return sorted_plan(indices, num_experts)
