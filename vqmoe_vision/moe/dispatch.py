"""Sending tokens to experts and putting the answers together.

Legend: T tokens, K experts per token, A = T * K assignments, R = A rows sorted by expert,
E experts, D width.

Dropless and exact: one stable sort by expert, int32 group ends, a gather, two grouped linear
layers, and a weighted sum through the inverse permutation. Nothing here knows how a token was
routed. `run_experts_loop` is the same computation as a plain loop: the oracle of the tests.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .experts import Experts
from .grouped_linear import compute_dtype
from .plan import make_plan


def run_experts(
    experts: Experts, x: Tensor, indices: Tensor, weights: Tensor, kept: Tensor | None = None
) -> Tensor:
    """Weighted sum of the chosen experts' answers.

    Args:
        experts: The layer's experts.
        x: Tokens (T, D).
        indices: (T, K) int64 in [0, E).
        weights: (T, K).
        kept: (T, K) bool; assignments marked False contribute nothing and are not computed.

    Returns:
        (T, D) in the dtype that the experts compute in.
    """
    k = indices.shape[1]
    flat = indices if kept is None else indices.masked_fill(~kept, experts.num_experts)
    dtype = compute_dtype(x)
    plan = make_plan(flat.reshape(-1), experts.num_experts, dtype)
    rows = experts(x.to(dtype)[plan.order // k], plan.offsets)
    return combine(rows, plan.inverse.view(-1, k), weights)


def combine(rows: Tensor, positions: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum over K of the rows at `positions`.

    Args:
        rows: (R, D).
        positions: (T, K) int64.
        weights: (T, K), cast to the rows' dtype.

    Returns:
        (T, D).
    """
    if positions.shape[1] == 1:
        return rows[positions.squeeze(1)] * weights.to(rows.dtype)
    # forward and backward in one pass each, 1.3 to 2 times faster than gather and sum on CPU
    return F.embedding_bag(positions, rows, per_sample_weights=weights.to(rows.dtype), mode='sum')


def run_experts_loop(
    experts: Experts, x: Tensor, indices: Tensor, weights: Tensor, kept: Tensor | None = None
) -> Tensor:
    """Same as `run_experts`, one expert after the other; slow, plain, the tests' oracle."""
    weights = weights if kept is None else weights * kept
    out = torch.zeros_like(x)
    fc1, fc2 = experts.fc1, experts.fc2
    for e in range(experts.num_experts):
        token, choice = torch.nonzero(indices == e, as_tuple=True)
        hidden = F.linear(x[token], fc1.weight[e], None if fc1.bias is None else fc1.bias[e])
        answer = F.linear(
            experts.act(hidden), fc2.weight[e], None if fc2.bias is None else fc2.bias[e]
        )
        out = out.index_add(0, token, answer * weights[token, choice, None].to(answer.dtype))
    return out
