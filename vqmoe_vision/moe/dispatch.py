"""Sending tokens to experts and putting the answers together.

Legend: T tokens, K experts per token, A = T * K assignments, R rows that stand together by expert,
E experts, D width.

Dropless and exact: a plan of the rows, a gather, two grouped linear layers, and a weighted sum.
Each assignment has one row, so backward passes gather as well: autograd would scatter, which on CPU
is one thread's work and took a tenth of a layer's time. Nothing here knows how a token was routed.
`run_experts_loop` is the same computation as a plain loop: the oracle of the tests.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .experts import Experts
from .grouped_linear import compute_dtype
from .plan import Plan, make_plan


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
    rows = experts(gather(x.to(dtype), plan, k), plan.offsets)
    return combine(rows, plan, weights)


def gather(x: Tensor, plan: Plan, k: int) -> Tensor:
    """The rows of a plan.

    Args:
        x: Tokens (T, D).
        plan: Plan of A = T * k assignments, those of a token side by side.
        k: Assignments per token.

    Returns:
        (R, D).
    """
    return _Gather.apply(x, plan.order // k, plan.inverse.view(-1, k))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(positions)
        return x.index_select(0, tokens)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return F.embedding_bag(ctx.saved_tensors[0], grads[0], mode='sum'), None, None


def combine(rows: Tensor, plan: Plan, weights: Tensor) -> Tensor:
    """Weighted sum of the K rows of each token.

    Args:
        rows: Answers (R, D).
        plan: Plan of A = T * K assignments.
        weights: (T, K), cast to the rows' dtype.

    Returns:
        (T, D).
    """
    positions = plan.inverse.view(weights.shape)
    return _Combine.apply(rows, weights.to(rows.dtype), plan.order, positions)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weights: Tensor, order: Tensor, positions: Tensor
    ) -> Tensor:
        ctx.save_for_backward(rows, weights, order, positions)
        return F.embedding_bag(positions, rows, per_sample_weights=weights, mode='sum')

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, weights, order, positions = ctx.saved_tensors
        by_row = grads[0].index_select(0, order // weights.shape[1])
        grad_weights = torch.linalg.vecdot(by_row, rows)[positions]
        # rows that only fill a group get no gradient: their weight is zero
        row_weights = weights.new_zeros(len(rows)).scatter(
            0, positions.flatten(), weights.flatten()
        )
        return by_row.mul_(row_weights[:, None]), grad_weights, None, None


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
        out.index_add_(0, token, answer * weights[token, choice, None].to(answer.dtype))
    return out
