"""What a codebook makes of a sample of tokens: starting codes, and CVQ's anchors.

Nothing is read back from the device, every rank finds the same, and the user's random stream is
left alone. `usable` (S,) bool says which rows of a sample count, the first one among them.

Legend: D width, M codes, S sampled tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .codebook import NORM_EPS, nearest_code
from .counted_random import random_choice
from .routing import full_precision

KMEANS_ITERATIONS = 10


@torch.no_grad()
def kmeans(
    sample: Tensor, num_codes: int, cosine: bool = False, usable: Tensor | None = None
) -> Tensor:
    """Codes (M, D) of a sample (S, D) by k-means++ and Lloyd, of length one if `cosine`."""
    if usable is None:
        usable = torch.ones(len(sample), dtype=torch.bool, device=sample.device)
    codes = _spread(sample, num_codes, usable)
    with full_precision(sample):
        for _ in range(KMEANS_ITERATIONS):
            codes = _means(sample, codes, cosine, usable)
    return codes


def _spread(sample: Tensor, num_codes: int, usable: Tensor) -> Tensor:
    """The start of k-means++: tokens, each chosen in proportion to its squared distance."""
    chosen = [sample[:1]]
    nearest = torch.full_like(sample[:, 0], torch.inf)
    for number in range(1, num_codes):
        distance = torch.linalg.vector_norm(sample - chosen[-1], dim=1)
        nearest = torch.minimum(nearest, distance).masked_fill(~usable, 0)
        # over the largest: squares of large distances have no finite sum; above 0: codes repeat
        # where there are fewer distinct tokens
        weights = (nearest / nearest.max().clamp(min=1e-30)).square() + 1e-12
        pick = random_choice(weights.masked_fill(~usable, 0), number)
        chosen.append(sample.index_select(0, pick.view(1)))
    return torch.cat(chosen)


def _means(sample: Tensor, codes: Tensor, cosine: bool, usable: Tensor) -> Tensor:
    """An iteration of Lloyd: the mean of those that are nearest to each code."""
    numbers = torch.arange(len(codes), device=sample.device)
    is_member = nearest_code(sample, codes)[:, None] == numbers
    members = (is_member & usable[:, None]).to(sample.dtype)
    counts = members.sum(dim=0)[:, None]
    means = members.t() @ sample / counts.clamp(min=1)
    if cosine:
        means = F.normalize(means, dim=1, eps=NORM_EPS)
    return torch.where(counts > 0, means, codes)  # a code without members stays


def code_shares(sample: Tensor, codes: Tensor, usable: Tensor) -> Tensor:
    """Share of a sample (S, D) that takes each code (M, D), (M,) float32."""
    counts = torch.zeros(len(codes), device=codes.device, dtype=torch.float32)
    counts = counts.index_add(0, nearest_code(sample, codes), usable.float())
    # a code that none takes counts as if one did: of no weight at all, it would have no place
    return counts.clamp(min=1) / usable.sum().clamp(min=1)


def anchor_probabilities(codes: Tensor, sample: Tensor, usable: Tensor) -> Tensor:
    """How likely CVQ draws a token as a code's anchor, (M, S): softmax(-distance^2)."""
    distances = torch.cdist(codes, sample).square()
    return distances.masked_fill(~usable, torch.inf).neg().softmax(dim=1)  # nan if none is usable
