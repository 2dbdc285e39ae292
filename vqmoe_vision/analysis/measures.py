"""Measures of routing: pure functions of counts, tokens and weights.

docs/reference/measures.md says what a collapsed and a sound model give, and where each one is from.

Legend: T tokens, D width, E experts, C classes, M codes, P parameters, S checkpoints.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vqmoe_vision.moe.experts import Experts
from vqmoe_vision.moe.losses import squared_variation
from vqmoe_vision.moe.routing import perplexity


def entropy(counts: Tensor) -> float:
    """Entropy of counts or shares of any shape, in nats (Shannon 1948); 0 of nothing."""
    counts = counts.double()
    return torch.special.entr(counts / counts.sum().clamp(min=1e-300)).sum().item()


def load_entropy(load: Tensor) -> float:
    """H(load) / log E of counts or shares (E,): 1 if even, or of one expert; 0 if one takes all."""
    return entropy(load) / math.log(load.numel()) if load.numel() > 1 else 1.0


def load_variation(load: Tensor) -> float:
    """Coefficient of variation, std / mean, of counts or shares (E,), in [0, sqrt(E - 1)]."""
    return squared_variation(load.double()).sqrt().item()


def num_dead(usage: Tensor) -> int:
    """How many experts or codes received nothing at all, of counts or shares (E,) or (M,)."""
    return int((usage == 0).sum())


def usage_perplexity(usage: Tensor) -> float:
    """exp(entropy) of counts or shares (M,): how many codes are in use, weighted by how often."""
    usage = usage.double()
    return perplexity(usage / usage.sum().clamp(min=1e-300))


def mutual_information(counts: Tensor) -> float:
    """H(expert) + H(class) - H(expert, class), in nats, of counts (E, C)."""
    # without any connection T tokens still give about (E - 1)(C - 1) / 2T (Miller 1955)
    shared = entropy(counts.sum(dim=1)) + entropy(counts.sum(dim=0)) - entropy(counts)
    return max(shared, 0.0)  # independence gives a rounding error of either sign


def normalized_mutual_information(counts: Tensor) -> float:
    """The same over the most that it can be, min(H(expert), H(class)), in [0, 1]."""
    most = min(entropy(counts.sum(dim=1)), entropy(counts.sum(dim=0)))
    return mutual_information(counts) / most if most > 0 else 0.0


def quantization_error(squared_distance: float, energy: float) -> float:
    """Squared distance of tokens to codes over `sum |x|^2`, or over that around their mean."""
    return squared_distance / max(energy, 1e-300)


def effective_rank(gram: Tensor) -> float:
    """exp(entropy) of tokens' singular values, in [1, min(T, D)], from their X^T X (D, D)."""
    return usage_perplexity(torch.linalg.eigvalsh(gram.double()).clamp(min=0).sqrt())


def weight_similarity(experts: Experts) -> Tensor:
    """Cosine similarity (E, E) of parameters, weights and biases of an expert in one vector."""
    flat = torch.cat([p.detach().cpu().double().flatten(1) for p in experts.parameters()], dim=1)
    unit = F.normalize(flat, dim=1)
    return unit @ unit.t()


@torch.no_grad()
def expert_outputs(experts: Experts, tokens: Tensor) -> Tensor:
    """Every expert's answer (E, T, D) to every token (T, D), wherever it is sent."""
    number, tokens = experts.num_experts, tokens.to(next(experts.parameters()))
    return experts.evenly(tokens.expand(number, -1, -1))


def output_similarity(outputs: Tensor) -> Tensor:
    """Cosine similarity (E, E) of answers (E, T, D) to the same tokens, averaged over tokens."""
    unit = F.normalize(outputs.double(), dim=-1)
    return torch.einsum('etd,ftd->ef', unit, unit) / outputs.shape[1]


def mean_similarity(similarity: Tensor) -> float:
    """Mean over pairs of different experts of (E, E) similarities; 1 of a single expert."""
    others = ~torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    return similarity[others].mean().item() if len(similarity) > 1 else 1.0


def changed_share(before: Tensor, after: Tensor) -> float:
    """Share of tokens with another first expert, -1 for none; between two trainings it is void."""
    return (before != after).double().mean().item()


def chance_of_change(usage: Tensor) -> float:
    """What `changed_share` is if experts are drawn anew from the same load (E,): 1 - sum p^2."""
    return 1 - (usage.double() / usage.sum().clamp(min=1e-300)).square().sum().item()


def kept_beyond_chance(changed: float, by_chance: float) -> float:
    """What stays of choices beyond chance: Cohen's kappa, if the load stays."""
    return 1 - changed / by_chance


def similarity_to_last(checkpoints: Tensor) -> Tensor:
    """Cosine similarity (S,) of parameters (S, P), oldest first, with those at the last."""
    unit = F.normalize(checkpoints.double(), dim=1)
    return unit @ unit[-1]


def distance_to_last(checkpoints: Tensor) -> Tensor:
    """`|p_s - p_S| / |p_1 - p_S|`, (S,), of parameters (S, P): from 1 to 0; 0 if nothing moved."""
    left = (checkpoints.double() - checkpoints[-1].double()).norm(dim=1)
    return left / left[0].clamp(min=1e-300)
