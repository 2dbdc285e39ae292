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
    """Computes the linear layers of all experts."""

    grouped_linear: Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]
    misfit: Callable[[Tensor, Tensor], str | None] = lambda x, weight: None
    make_plan: Callable[[Tensor, int, torch.dtype], Plan] = field(default_factory=lambda: _sorted)


def _sorted(indices: Tensor, num_experts: int, dtype: torch.dtype) -> Plan:
    return sorted_plan(indices, num_experts)
