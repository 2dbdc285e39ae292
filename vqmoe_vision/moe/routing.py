"""What a router says, and the pure functions routers are made of.

Legend: T tokens, D width, E experts, K experts per token, A = T * K assignments, C capacity.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .config import TopKConfig


@dataclass(frozen=True)
class Routing:
    """Which experts a token goes to and with which weight.

    Args:
        indices: Expert of each assignment, (T, K) int64 in [0, E).
        weights: Combine weight of each assignment, (T, K) float32.
        losses: Weighted auxiliary losses, name to 0-dim float32 tensor. Empty in eval mode.
        stats: Detached tensors for the log.
        kept: (T, K) bool, False for assignments dropped by a capacity; None if nothing can drop.
    """

    indices: Tensor
    weights: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    stats: dict[str, Tensor] = field(default_factory=dict)
    kept: Tensor | None = None


class Router(nn.Module):
    """Base of routers that choose `config.top_k` experts: tokens in, `Routing` out.

    A router has no side effect; what it learns without gradients changes elsewhere.
    """

    config: TopKConfig

    def forward(self, x: Tensor) -> Routing:
        """Route tokens (T, D)."""
        raise NotImplementedError

    def macs_per_token(self) -> int:
        """Multiply-accumulates of one routing decision."""
        raise NotImplementedError

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should leave alone."""
        raise NotImplementedError


def full_precision(x: Tensor) -> AbstractContextManager:
    """Context in which autocast leaves float32 alone.

    Routers decide in float32: on CPU, top-1 experts of 0.4 % of tokens differ when logits are
    bfloat16, of 6 % when probabilities are.
    """
    # the meta device knows no autocast, there is nothing to switch off
    if x.device.type == 'meta':
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def top_k_experts(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Best `k` experts of each token, best first.

    Args:
        scores: (T, E).
        k: K.

    Returns:
        Scores (T, K) with gradient, and indices (T, K) int64.
    """
    if k == 1:
        # max is several times faster than topk on CPU, and defines ties: the first expert wins
        values, indices = scores.max(dim=-1, keepdim=True)
        return values, indices
    values, indices = scores.topk(k, dim=-1)
    return values, indices


def renormalized(weights: Tensor) -> Tensor:
    """Weights (T, K) that sum to 1 over K; equals softmax over the selected logits (GShard)."""
    return weights / weights.sum(dim=-1, keepdim=True)


def expert_load(indices: Tensor, num_experts: int) -> Tensor:
    """Share of assignments that each expert receives.

    Args:
        indices: (T, K) int64.
        num_experts: E.

    Returns:
        (E,) float32, sums to 1; all zero without tokens.
    """
    flat = indices.reshape(-1)
    ones = torch.ones_like(flat, dtype=torch.float32)
    counts = torch.zeros(num_experts, device=flat.device).scatter_add(0, flat, ones)
    return counts / max(flat.numel(), 1)


def perplexity(shares: Tensor) -> float:
    """exp(entropy) of shares (M,): M if all are even, 1 if one takes everything."""
    return math.exp(torch.special.entr(shares.double()).sum().item())


def init_lecun_normal(weight: Tensor) -> None:
    """Normal of variance 1 / D, cut off at two standard deviations: flax's default for a router.

    Args:
        weight: (E, D), changed in place.
    """
    # what the cut leaves has 0.87962566 of the spread of the uncut normal
    std = weight.shape[1] ** -0.5 / 0.87962566
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def init_orthogonal(weight: Tensor) -> None:
    """Orthogonal with gain 0.1 as StableMoE's code: rows, or columns if there are fewer.

    Drawn in float32 on the CPU. Not on the meta device, which has nothing to initialise and no QR.
    """
    if weight.device.type != 'meta':
        rows = nn.init.orthogonal_(torch.empty(weight.shape), gain=0.1)
        with torch.no_grad():
            weight.copy_(rows)


def within_capacity(
    indices: Tensor, num_experts: int, capacity: int, priority: Tensor | None = None
) -> Tensor:
    """Which assignments find a free place when an expert takes at most `capacity`.

    All first choices are served before any second choice (V-MoE, appendix C). Within one choice
    tokens are served in order, or by descending `priority` (batch-prioritised routing).

    Args:
        indices: (T, K) int64.
        num_experts: E.
        capacity: C, places per expert.
        priority: (T,) or None.

    Returns:
        (T, K) bool, True where the assignment is kept.
    """
    num_tokens, k = indices.shape
    by_token = indices
    if priority is not None:
        served = priority.argsort(descending=True, stable=True)
        by_token = indices[served]
    queue = by_token.t().reshape(-1)  # (T, K) -> (K * T,), choice-major
    ranked, order = queue.sort(stable=True)
    experts = torch.arange(num_experts, device=queue.device)
    first = torch.searchsorted(ranked, experts)
    place = torch.arange(queue.numel(), device=queue.device) - first[ranked]
    kept = torch.empty_like(queue, dtype=torch.bool).scatter(0, order, place < capacity)
    kept = kept.view(k, num_tokens).t()
    if priority is not None:
        kept = torch.empty_like(kept).scatter(0, served[:, None].expand_as(kept), kept)
    return kept
