"""Several branches over the same experts, in one dispatch.

Legend: T tokens, D width, E experts, K branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .dispatch import run_experts
from .experts import Experts
from .kernels import compute_dtype
from .losses import token_mean
from .routing import Routing, expert_load


class Branch(NamedTuple):
    """What one branch asks of the experts, for every token."""

    inputs: Tensor  # (T, D), what its expert is fed
    experts: Tensor  # (T,) int64 in [0, E)
    weights: Tensor  # (T, 1) float32


def run_branches(
    experts: Experts,
    branches: Sequence[Branch],
    gates: Tensor | None = None,  # (T, K) float32, factors of the weights
    last_norm: nn.Module | None = None,  # of the answers of the last branch
) -> Tensor:
    """Weighted sum (T, D) of branches: one sort, and one pass over the experts' weights."""
    weights = torch.cat([branch.weights for branch in branches], dim=1)
    if gates is not None:
        weights = weights * gates
    indices = torch.stack([branch.experts for branch in branches], dim=1)
    dtype = compute_dtype(branches[0].inputs)
    inputs = torch.stack([branch.inputs.to(dtype) for branch in branches], dim=1).flatten(0, 1)
    if last_norm is None:
        return run_experts(experts, inputs, Routing(indices, weights))
    each = Routing(indices.view(-1, 1), torch.ones_like(weights).view(-1, 1))
    answers = list(run_experts(experts, inputs, each).unflatten(0, indices.shape).unbind(1))
    answers[-1] = last_norm(answers[-1]).to(dtype)
    pairs = zip(answers, weights.to(dtype).split(1, dim=1), strict=True)
    return torch.stack([answer * weight for answer, weight in pairs]).sum(dim=0)


def branch_statistics(num_experts: int, branches: Sequence[Branch]) -> dict[str, Tensor]:
    """`load` (E,) by all branches; of two also `agreement`, the share of tokens with one expert."""
    experts = torch.stack([branch.experts for branch in branches], dim=1)
    stats = {'load': expert_load(experts, num_experts)}
    if len(branches) == 2:
        stats['agreement'] = token_mean((experts[:, 0] == experts[:, 1]).float())
    return stats
