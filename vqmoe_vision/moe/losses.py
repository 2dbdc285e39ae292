"""Auxiliary losses of routers: pure functions, one equation each, value and gradient in float32.

A loss is a mean over tokens, which is a tensor, or a `BalanceLoss`. Every balance term is 1 at
perfectly even routing, whatever K; coefficients of variation, entropy and StableMoE's are 0. Papers
and libraries differ by factors (transformers' Mixtral gives K, the public VQMoE gates 1 / K).

Processes that share a batch average losses by one sum over ranks for all layers, of numbers without
a gradient, after the forward pass. In backward it could meet those of data-parallel training in
another order on another rank, and gradient checkpointing would repeat it. Gradients are those of
the whole batch once they are averaged over ranks, as DDP and FSDP do. With n_r of N tokens on rank
r of S, a mean m = sum_r n_r/N m_r and a loss F(m), the gradient is sum_r n_r/N F'(m) dm_r. Here
every rank has S n_r/N F'(m) dm_r.

Legend: T tokens, E experts, K experts per token, M codes; scores and probabilities are (T, E) or
(T, M), indices (T, K) int64.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .config import MoeConfig, option
from .distributed import rank_and_size, sum_over_ranks
from .routing import ExactBuffers, Routing, TopKRouter, expert_load, token_mean, top_k_experts


@dataclass(frozen=True)
class BalanceLoss:
    """A function of means over a batch's tokens: ranks average the means, not the values."""

    means: Tensor  # over tokens, float32 of any shape
    function: Callable[[Tensor], Tensor]  # of the means of L layers, (L, ...) -> (L,)
    weight: float = 1.0

    def __rmul__(self, weight: float) -> 'BalanceLoss':
        return BalanceLoss(self.means, self.function, weight * self.weight)

    def value(self) -> Tensor:
        """0-dim tensor."""
        return self.weight * self.function(self.means[None])[0]


Loss = Tensor | BalanceLoss


def weighted(router: Any, **terms: Callable[[], Loss]) -> dict[str, Loss]:
    """Losses of a router in training, times their weights in its options."""
    # those of weight zero are not even computed: they may be undefined, as the load without noise
    weights = {name: getattr(router.config, f'{name}_weight') for name in terms}
    chosen = [name for name in terms if router.training and weights[name] > 0]
    found = {name: weights[name] * terms[name]() for name in chosen}
    return balanced(found, router.config.global_balance)


def balanced(losses: dict[str, Loss], over_all: bool) -> dict[str, Loss]:
    """Losses by name, of this process's tokens alone unless they balance `over_all` processes."""
    return losses if over_all else {**values_of(losses)}


def values_of(losses: Mapping[str, Loss]) -> dict[str, Tensor]:
    """Losses of the tokens of this process alone, 0-dim each."""
    means = [loss.means if isinstance(loss, BalanceLoss) else loss for loss in losses.values()]
    return dict(zip(losses, _values([*losses.values()], means), strict=True))


def _values(losses: Sequence[Loss], means: Sequence[Tensor]) -> list[Tensor]:
    """0-dim tensors of losses with these means; those of many layers in one call."""
    values, alike = [*means], defaultdict(list)
    for place, (loss, mean) in enumerate(zip(losses, means, strict=True)):
        if isinstance(loss, BalanceLoss):
            alike[loss.function, loss.weight, mean.shape, mean.dtype].append(place)
    for (function, weight, *_), places in alike.items():
        found = weight * function(torch.stack([means[place] for place in places]))
        for place, value in zip(places, found.unbind(), strict=True):
            values[place] = value
    return values


def averaged_over_ranks(losses: Sequence[tuple[Loss, int]]) -> list[Tensor]:
    """Values, 0-dim, for the batch of all ranks, which ask with the same losses in one order."""
    size, every = rank_and_size()[1], [loss for loss, _ in losses]
    means = [loss.means if isinstance(loss, BalanceLoss) else loss for loss in every]
    if size == 1 or not losses:
        return _values(every, means)
    # each counts by its number of tokens, or of whatever its means are means over
    parts = [
        # bfloat16 cannot count to 257
        number * mean.flatten().to(torch.promote_types(mean.dtype, torch.float32))
        for (_, number), mean in zip(losses, means, strict=True)
    ]
    own = torch.cat(parts)
    numbers = [own.new_full((1,), number) for _, number in losses]
    total = sum_over_ranks(torch.cat([own.detach(), *numbers]))
    sums, counts = total.split([own.numel(), len(losses)])
    # the value of all ranks, the gradient of this one
    sums = sums + size * (own - own.detach())
    by_loss = zip(means, sums.split([part.numel() for part in parts]), counts, strict=True)
    return _values(every, [(s / n.clamp(min=1)).view_as(mean) for mean, s, n in by_loss])


def itself(means: Tensor) -> Tensor:
    """Means of tokens, (L,), whose layers share their operators."""
    return means


def load_balance(probs: Tensor, indices: Tensor, load: Tensor | None = None) -> BalanceLoss:
    """Switch / GShard balance loss, E * sum_i f_i P_i (arXiv 2101.03961, equation 4)."""
    # f, the shares of assignments, has no gradient; P is the mean probability
    load = expert_load(indices, probs.shape[-1]) if load is None else load
    return BalanceLoss(torch.stack([load, token_mean(probs)]), _inner_product)


def _inner_product(means: Tensor) -> Tensor:
    """E * sum_i f_i P_i of both, (L, 2, E) -> (L,)."""
    load, probability = means.unbind(dim=1)
    return means.shape[-1] * (load * probability).sum(dim=-1)


def squared_variation(values: Tensor) -> Tensor:
    """Squared coefficient of variation of (..., E), var / mean^2 with the population variance."""
    # not std^2: a standard deviation has no finite derivative at exact balance
    return values.var(dim=-1, correction=0) / (values.mean(dim=-1).square() + 1e-10)


def importance(probs: Tensor) -> BalanceLoss:
    """Importance loss of V-MoE (arXiv 2106.05974, equation 6), of probabilities without noise."""
    return BalanceLoss(token_mean(probs), squared_variation)


def load(logits: Tensor, noisy_logits: Tensor, noise_std: float, top_k: int) -> BalanceLoss:
    """Load loss of V-MoE (arXiv 2106.05974, equations 7 to 9)."""
    assert noise_std > 0, 'the load loss is defined by the noise'
    threshold = noisy_logits.topk(top_k, dim=-1).values[:, -1:]
    # 1 - Phi((threshold - logit) / noise_std): the chance to be chosen if its noise were drawn anew
    return BalanceLoss(
        token_mean(torch.erf((logits - threshold) / (noise_std * math.sqrt(2)))), _load_variation
    )


def _load_variation(errors: Tensor) -> Tensor:
    """Of the mean chance (1 + erf) / 2, (L, E) -> (L,)."""
    return squared_variation(0.5 * (1 + errors))


def router_z(logits: Tensor) -> Tensor:
    """Router z-loss of ST-MoE (arXiv 2202.08906, equation 5): mean of logsumexp^2."""
    return token_mean(logits.logsumexp(dim=-1).square())


def diversity(probs: Tensor) -> BalanceLoss:
    """Diversity of codes, wav2vec 2.0 (arXiv 2006.11477, equation 4) of one codebook: ln M - H."""
    # H of mean probabilities; the paper's is -H / M, of the same gradient but for M
    # a share of zero has a finite gradient, and adds nothing
    return BalanceLoss(token_mean(probs), _missing_entropy)


def _missing_entropy(shares: Tensor) -> Tensor:
    """Natural logarithm of M, minus H: (L, M) -> (L,)."""
    return (shares * (shares.shape[-1] * shares.clamp(min=1e-10)).log()).sum(dim=-1)


def overload(gates: Tensor, indices: Tensor, num_experts: int) -> BalanceLoss:
    """Balance loss of StableMoE (arXiv 2204.08396, equation 5) over tokens; gates are (T, K)."""
    # not index_add, whose sums on a GPU may differ from one run to the next
    by_expert = gates.new_zeros(indices.shape[0], num_experts).scatter(1, indices, gates)
    means = torch.stack([expert_load(indices, num_experts), token_mean(by_expert)])
    return BalanceLoss(means, _excess)


def _excess(means: Tensor) -> Tensor:
    """Sum of (|A_i| - n) / n * sum_{t in A_i} gate_t,i with n = T K / E, (L, 2, E) -> (L,)."""
    # counts have no gradient: an overloaded expert is pushed to smaller gates, an idle one up
    load, gates = means.unbind(dim=1)
    return ((load * means.shape[-1] - 1) * gates).sum(dim=-1)


@dataclass(frozen=True, kw_only=True)
class LossFreeConfig(MoeConfig):
    """Options of loss-free balancing.

    Args:
        bias_update_rate: u, the step of the bias that evens the load; 0 has no bias.
    """

    bias_update_rate: float = option(0.0, 0.01, bounds='[0, inf)', of_weights=False)


class LossFreeRouter(ExactBuffers, TopKRouter):
    """Base of routers whose choice has a bias, (E,) float32, if its rate is above 0."""

    exact_buffers = ('choice_bias',)
    config: Any
    choice_bias: Tensor

    def __init__(self, config: Any, device: Any = None, **_: Any) -> None:
        super().__init__()
        self.config, self.has_state = config, config.bias_update_rate > 0
        if self.has_state:
            bias = torch.empty(config.num_routed, device=device).float()
            self.register_buffer('choice_bias', bias)

    def init_weights(self) -> None:
        """No bias; a subclass draws its weights too."""
        if self.has_state:
            self.choice_bias.zero_()

    def choose(self, scores: Tensor, gates: Tensor) -> Tensor:
        """Experts (T, K) by gates (T, E) and the bias; without one by scores of the same order."""
        ranked = self.among_on(gates + self.choice_bias) if self.has_state else scores
        return top_k_experts(ranked, self.config.top_k)[1]

    def observe(self, routing: Routing) -> Tensor:
        """Assignments of each expert that can be chosen, (E,) int64."""
        experts = torch.arange(len(self.choice_bias), device=routing.indices.device)
        return (routing.indices.flatten()[:, None] == experts).sum(dim=0)

    def update(self, observed: Tensor) -> bool:
        """Move the bias towards experts with less than the mean."""
        rate = self.config.bias_update_rate
        self.choice_bias += rate * (observed.float().mean() - observed).sign()
        return True
