"""What a router says, and the pure functions routers are made of.

Legend: B images, N tokens per image, T = B * N tokens, D width, E experts, K experts per token,
A assignments of a token to an expert (T * K where every token has K), C capacity.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import TopKConfig
from .raw_patches import RawPatches


@dataclass(frozen=True)
class Routing:
    """Which tokens go to which experts, and with which weight."""

    indices: Tensor  # (T, K) or (A,) int64 in [0, E), expert of each assignment
    weights: Tensor  # as `indices`, float32, of each answer in the sum
    losses: dict = field(default_factory=dict)  # `Loss`, weighted; none in eval mode
    stats: dict[str, Tensor] = field(default_factory=dict)  # detached
    kept: Tensor | None = None  # (T, K) bool, False if a capacity dropped it
    tokens: Tensor | None = None  # (A,) int64 in [0, T), where tokens have any number
    load: Tensor | None = None  # (E,) float32, share of assignments, if it is known already
    shared: int = 0  # how many of K, the last, are the last experts of all, for every token
    even: bool = False  # whether experts have as many assignments each, one expert after the other

    def chosen(self) -> 'Routing':
        """Without the experts that all tokens share, which nothing chooses."""
        if self.shared == 0:
            return self
        indices, weights = (part[:, : -self.shared] for part in (self.indices, self.weights))
        kept = None if self.kept is None else self.kept[:, : -self.shared]
        return replace(self, indices=indices, weights=weights, kept=kept, shared=0)


class Switched(nn.Module):
    """Base of what experts may be switched off in, by `MoeLayer.switched`."""

    switches: Tensor | None = None  # (E,) bool, False is off; None where all are on

    def among_on(self, scores: Tensor, each: int = 1) -> Tensor:
        """Scores (..., M) of the first experts, `each` of one together, least where it is off."""
        if self.switches is None:
            return scores
        off = ~self.switches.repeat_interleave(each)[: scores.shape[-1]]
        # not -inf, with which a softmax would be nan where all are off, whatever the temperature
        return scores.masked_fill(off, max(-1e30, torch.finfo(scores.dtype).min))


class Router(Switched):
    """Base of routers, without side effects: tokens in, `Routing` out."""

    # whether it routes images (B, N, D), not tokens (T, D); of a padded batch it gets these and
    # their `ValidTokens`, which it routes
    per_image = False
    has_losses: bool = True  # in training, as its options are
    has_state: bool = False  # that learns without gradients
    permutation_equivariant = True  # not where tokens are routed by position
    raw_patches: RawPatches | None = None  # of the images, if it decides by them

    def forward(self, x: Tensor) -> Routing:
        """Route tokens (T, D), or images (B, N, D) if `per_image`."""
        raise NotImplementedError

    summands: int = 1  # answers of equal experts add up to as many, if chosen weights sum to 1

    @property
    def experts_per_token(self) -> float:
        """Experts that a token is sent to, on average."""
        raise NotImplementedError

    def observe(self, routing: Routing) -> Tensor:
        """What `update` learns from of a pass of training: numbers that passes and ranks add up."""
        raise NotImplementedError

    def update(self, observed: Tensor) -> bool:
        """Change state by these sums, once per step; returns whether it changed, or may have."""
        raise NotImplementedError


class ExactBuffers(nn.Module):
    """Base of modules of which some buffers stay as exact as they are when a model is cast."""

    exact_buffers: tuple[str, ...] = ()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(*args, **kwargs)
        for name in before.keys() & set(self.exact_buffers):
            buffer = self.get_buffer(name)
            if buffer.itemsize < 4:  # 16 bits round small steps away
                self._buffers[name] = before[name].to(buffer.device)
        return self


class TopKRouter(Router):
    """Base of routers that send every token to `config.top_k` experts."""

    config: TopKConfig

    @property
    def experts_per_token(self) -> float:
        """K."""
        return self.config.top_k


def full_precision(x: Tensor) -> AbstractContextManager:
    """Context in which autocast leaves float32 alone."""
    # in bfloat16, on CPU, 0.4 % of tokens get another expert by logits, 6 % by probabilities
    kind = x.device.type
    return nullcontext() if kind == 'meta' else torch.autocast(kind, enabled=False)


def top_k_experts(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` best of scores (T, E), best first: scores (T, K) with gradient, indices int64."""
    if k == 1:
        # max is several times faster than topk on CPU, and defines ties: the first expert wins
        return scores.max(dim=-1, keepdim=True)
    return scores.topk(k, dim=-1)


def probabilities(logits: Tensor) -> Tensor:
    """Softmax over experts, (T, E) of logits (T, E)."""
    if logits.device.type != 'cpu' or torch.compiler.is_compiling():
        return logits.softmax(dim=-1)
    # by columns: eager PyTorch takes five to nine times as long for many short rows
    return logits.t().softmax(dim=0).t()


def renormalized(weights: Tensor) -> Tensor:
    """Weights (T, K) that sum to 1 over K; equals softmax over the selected logits (GShard)."""
    return weights / weights.sum(dim=-1, keepdim=True)


def with_shared(routing: Routing, num_experts: int, shared: int) -> Routing:
    """A routing (T, K) to the first experts, and with weight 1 to the last, `shared` by all."""
    if shared == 0:
        return routing
    last = torch.arange(num_experts - shared, num_experts, device=routing.indices.device)
    last = last.expand(routing.indices.shape[0], -1)
    weights = routing.weights.new_ones(()).expand_as(last)
    kept = routing.kept
    return replace(
        routing,
        indices=torch.cat([routing.indices, last], dim=1),
        weights=torch.cat([routing.weights, weights], dim=1),
        kept=None if kept is None else torch.cat([kept, torch.ones_like(last).bool()], dim=1),
        load=expert_load(routing.indices, num_experts - shared, kept),
        shared=shared,
    )


def expert_load(indices: Tensor, num_experts: int, kept: Tensor | None = None) -> Tensor:
    """Share of assignments, those `kept`, of each expert: (E,) float32; zero without tokens."""
    experts = torch.arange(num_experts, device=indices.device)
    own = indices.reshape(-1, 1) == experts
    if kept is None:
        return token_mean(own, torch.float32)
    counts = (own & kept.reshape(-1, 1)).sum(dim=0)
    return counts / counts.sum().clamp(min=1)


def token_mean(values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Mean over dim 0, (T, ...) -> (...); zero without tokens."""
    mean = values.mean if values.shape[0] > 0 else values.sum
    return mean(dim=0, dtype=dtype)


class _Directions(torch.autograd.Function):
    """As `F.normalize`, whose backward pass is three times as many operators."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        ctx.eps, directions = eps, x / length.clamp(min=eps)
        ctx.save_for_backward(directions, length)
        return directions

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        directions, length = ctx.saved_tensors
        # along the direction nothing changes, but of vectors that are too short to have one
        along = torch.linalg.vecdot(grads[0], directions)[..., None] * (length > ctx.eps)
        return grads[0].addcmul(directions, along, value=-1) / length.clamp(min=ctx.eps), None


def directions(x: Tensor, eps: float) -> Tensor:
    """Vectors (..., D) of length one; those shorter than `eps` over `eps`."""
    in_graph = torch.jit.is_tracing()  # which knows no function of ours
    if torch.is_grad_enabled() and x.requires_grad and not in_graph:
        return _Directions.apply(x, eps)
    return F.normalize(x, dim=-1, eps=eps)


def widest(device: torch.device) -> torch.dtype:
    """What sums of many steps are kept in: float64, which Apple's MPS has not."""
    return torch.float32 if device.type == 'mps' else torch.float64


def perplexity(shares: Tensor) -> float:
    """exp(entropy) of shares (M,): M if all are even, 1 if one takes everything."""
    return perplexities(shares, dim=0).item()


def perplexities(shares: Tensor, dim: int) -> Tensor:
    """The same of many at once, float64: shares sum to 1 along `dim`, which goes."""
    return torch.special.entr(shares.double()).sum(dim).exp()


def init_lecun_normal(weight: Tensor, scale: float = 1.0) -> None:
    """Normal of variance s / D for (E, D), cut off at two standard deviations: s = 1 is flax's."""
    # what the cut leaves has 0.87962566 of the spread of the uncut normal
    # s of Switch Transformers (arXiv 2101.03961, section 2.4)
    std = (scale / weight.shape[1]) ** 0.5 / 0.87962566
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def init_orthogonal(weight: Tensor, gain: float = 0.1) -> None:
    """Orthogonal rows, or columns if there are fewer, of length `gain`: 0.1 as StableMoE's code."""
    if weight.device.type != 'meta':
        # in float32 on the CPU; the meta device has no QR
        rows = nn.init.orthogonal_(torch.empty(weight.shape, dtype=torch.float32), gain=gain)
        with torch.no_grad():
            weight.copy_(rows)


def within_capacity(
    indices: Tensor, num_experts: int, capacity: int | Tensor, priority: Tensor | None = None
) -> Tensor:
    """Which assignments (T, K) find one of at most `capacity` places of their expert, bool."""
    # first choices before second ones (V-MoE, appendix C), then in order of tokens or of descending
    # `priority` (T,) (batch-prioritised routing)
    num_tokens, k = indices.shape
    by_token = indices
    if priority is not None:
        served = priority.argsort(descending=True, stable=True)
        by_token = indices[served]
    queue = by_token.t().reshape(-1)  # (T, K) -> (K * T,), choice-major
    ranked, order = queue.sort(stable=True)
    first = torch.searchsorted(ranked, torch.arange(num_experts, device=queue.device))
    place = torch.arange(queue.numel(), device=queue.device) - first[ranked]
    kept = torch.empty_like(queue, dtype=torch.bool).scatter(0, order, place < capacity)
    kept = kept.view(k, num_tokens).t()
    if priority is not None:
        kept = torch.empty_like(kept).scatter(0, served[:, None].expand_as(kept), kept)
    return kept
