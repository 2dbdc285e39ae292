"""What a router says, and the pure functions routers are made of.

Legend: B images, N tokens per image, T = B * N tokens, D width, E experts, K experts per token,
A assignments of a token to an expert (T * K where every token has K), C capacity.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .config import TopKConfig
from .host import RawPatches
from .joint_losses import Loss


@dataclass(frozen=True)
class Routing:
    """Which tokens go to which experts, and with which weight."""

    indices: Tensor
    weights: Tensor
    losses: dict[str, Loss] = field(default_factory=dict)
    stats: dict[str, Tensor] = field(default_factory=dict)
    kept: Tensor | None = None
    tokens: Tensor | None = None


class Router(nn.Module):
    """Base of routers: tokens in, `Routing` out."""

    per_image = False
    has_losses: bool = True
    raw_patches: RawPatches | None = None

    def forward(self, x: Tensor) -> Routing:
        """Route tokens (T, D), or images (B, N, D) if `per_image`."""
        raise NotImplementedError

    @property
    def experts_per_token(self) -> float:
        """Experts that a token is sent to, on average."""
        raise NotImplementedError


class TopKRouter(Router):
    """Base of routers that send every token to `config.top_k` experts."""

    config: TopKConfig

    @property
    def experts_per_token(self) -> float:
        """K."""
        return self.config.top_k


def full_precision(x: Tensor) -> AbstractContextManager:
    """Context in which autocast leaves float32 alone."""
    # the meta device knows no autocast, there is nothing to switch off
    if x.device.type == 'meta':
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def top_k_experts(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Best `k` experts of each token, best first."""
    if k == 1:
        # max is several times faster than topk on CPU, and defines ties: the first expert wins
        values, indices = scores.max(dim=-1, keepdim=True)
        return values, indices
    values, indices = scores.topk(k, dim=-1)
    return values, indices


def renormalized(weights: Tensor) -> Tensor:
    """Weights (T, K) that sum to 1 over K; equals softmax over the selected logits (GShard)."""
    return weights / weights.sum(dim=-1, keepdim=True)


def expert_load(indices: Tensor, num_experts: int, kept: Tensor | None = None) -> Tensor:
    """Share of assignments that each expert receives."""
    flat = indices.reshape(-1)
    ones = torch.ones_like(flat, dtype=torch.float32) if kept is None else kept.reshape(-1).float()
    counts = ones.new_zeros(num_experts).scatter_add(0, flat, ones)
    return counts / (max(flat.numel(), 1) if kept is None else counts.sum().clamp(min=1))


def perplexity(shares: Tensor) -> float:
    """exp(entropy) of shares (M,): M if all are even, 1 if one takes everything."""
    return perplexities(shares, dim=0).item()


def perplexities(shares: Tensor, dim: int) -> Tensor:
    """The same of many at once."""
    return torch.special.entr(shares.double()).sum(dim).exp()


def init_lecun_normal(weight: Tensor, scale: float = 1.0) -> None:
    """Normal of variance s / D, cut off at two standard deviations: with s = 1 flax's default."""
    # what the cut leaves has 0.87962566 of the spread of the uncut normal
    std = (scale / weight.shape[1]) ** 0.5 / 0.87962566
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def init_orthogonal(weight: Tensor, gain: float = 0.1) -> None:
    """Orthogonal: rows, or columns if there are fewer."""
    if weight.device.type != 'meta':
        rows = nn.init.orthogonal_(torch.empty(weight.shape, dtype=torch.float32), gain=gain)
        with torch.no_grad():
            weight.copy_(rows)


def within_capacity(
    indices: Tensor, num_experts: int, capacity: int | Tensor, priority: Tensor | None = None
) -> Tensor:
    """Which assignments find a free place when an expert takes at most `capacity`."""
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
