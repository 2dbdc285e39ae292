"""What a codebook makes of a sample of tokens: starting codes, and CVQ's anchors.

Legend: D width, M codes, S sampled tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .codebook import NORM_EPS, nearest_code

KMEANS_ITERATIONS = 10


@torch.no_grad()
def kmeans(sample: Tensor, num_codes: int, cosine: bool = False) -> Tensor:
    """Codes from k-means++ and Lloyd iterations, the same on every rank for the same sample.

    A cluster that loses all members keeps its mean. With fewer distinct tokens than codes some
    codes repeat.

    Args:
        sample: (S, D) float32.
        num_codes: M.
        cosine: Of directions: means are of length one, as the tokens of the sample.

    Returns:
        (M, D).
    """
    # a generator of its own: starting a codebook leaves the user's random stream alone
    generator = torch.Generator().manual_seed(0)
    codes = sample[:1]
    for _ in range(num_codes - 1):
        distance = torch.cdist(sample, codes).min(dim=1).values.cpu()
        # over the largest: squares of large distances have no finite sum
        weights = (distance / distance.max().clamp(min=1e-30)).square() + 1e-12
        pick = torch.multinomial(weights, 1, generator=generator)
        codes = torch.cat([codes, sample[pick.to(sample.device)]])
    for _ in range(KMEANS_ITERATIONS):
        members = F.one_hot(nearest_code(sample, codes), num_codes).to(sample.dtype)
        counts = members.sum(dim=0)[:, None]
        means = members.t() @ sample / counts.clamp(min=1)
        if cosine:
            means = F.normalize(means, dim=1, eps=NORM_EPS)
        codes = torch.where(counts > 0, means, codes)
    return codes


def anchor_probabilities(codes: Tensor, sample: Tensor) -> Tensor:
    """How likely CVQ draws each token as the anchor of a code: softmax(-distance^2).

    Args:
        codes: (M, D) float32.
        sample: (S, D) float32.

    Returns:
        (M, S), rows sum to 1.
    """
    return torch.cdist(codes, sample).square().neg().softmax(dim=1)
