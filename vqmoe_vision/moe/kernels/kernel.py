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
    """Computes the linear layers of all experts. Any kernel takes the plan of any other.

    Args:
        grouped_linear: Layer e on rows offsets[e - 1]:offsets[e], from rows (R, in), weight
            (E, out, in) and bias (E, out) or None of one dtype, and offsets (E,) int32. Rows past
            the last end give zero.
        misfit: Why it cannot compute for these rows and this weight, None if it can.
        make_plan: The rows that suit it, from indices (A,) in [0, E], of which E marks an
            assignment that no expert computes, from E, and the dtype that experts compute in. By
            default a row for each assignment.
    """

    grouped_linear: Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]
    misfit: Callable[[Tensor, Tensor], str | None] = lambda x, weight: None
    make_plan: Callable[[Tensor, int, torch.dtype], Plan] = field(default_factory=lambda: _sorted)


def _sorted(indices: Tensor, num_experts: int, dtype: torch.dtype) -> Plan:
    return sorted_plan(indices, num_experts)
