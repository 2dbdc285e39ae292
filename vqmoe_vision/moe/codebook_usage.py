"""What a codebook learns from without gradients: how tokens use it, over passes and ranks.

Legend: T tokens, D width, M codes, S = SAMPLE_SIZE sampled tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .codebook import NORM_EPS
from .counted_random import random_uniform

SAMPLE_SIZE = 1024  # tokens kept of all passes, for starting codes and replacing dead ones
SPOILT = 2.0  # the key of a token that cannot be used, behind all others


@dataclass(frozen=True)
class CodeUsage:
    """Counts, sums and a uniform sample of the tokens of any number of forward passes.

    The sample holds the S tokens with the smallest of independent random keys. So it can be merged
    from the samples of passes and ranks, in memory that does not grow, and every token has the same
    chance, whatever image and position it comes from. A key is a function of counters, see
    `code_usage`: a run that resumes draws what it would have drawn.

    Args:
        counts: (M,) float32, tokens per code.
        token_sums: (M, D) float32, sum of each code's tokens.
        keys: (S,) float32, keys of the sample in rising order: below 1 of tokens, `SPOILT` of those
            that cannot be used, and infinite where there is none.
        tokens: (S, D) float32, the sample; zeros where the key is not below 1.
        num_passes: How many forward passes with tokens are in it, on this rank.
    """

    counts: Tensor
    token_sums: Tensor
    keys: Tensor
    tokens: Tensor
    num_passes: int = 1

    @property
    def num_tokens(self) -> Tensor:
        """Tokens in all, 0-dim float32."""
        return self.counts.sum()

    @property
    def usable(self) -> Tensor:
        """Which rows of the sample are tokens, (S,) bool; the first ones, as keys rise."""
        return self.keys < 1

    @property
    def seen(self) -> Tensor:
        """Whether there was any token, usable or not, 0-dim bool."""
        return self.keys[0].isfinite()

    def merged(self, later: CodeUsage) -> CodeUsage:
        """Usage in the passes of both."""
        return CodeUsage(
            self.counts + later.counts,
            self.token_sums + later.token_sums,
            *_smallest(torch.cat([self.keys, later.keys]), torch.cat([self.tokens, later.tokens])),
            self.num_passes + later.num_passes,
        )

    def over_ranks(self) -> CodeUsage:
        """Usage on all ranks; the same object in a single process."""
        if not (dist.is_available() and dist.is_initialized()):
            return self
        sums = torch.cat([self.counts[:, None], self.token_sums], dim=1)
        dist.all_reduce(sums)
        sample = torch.cat([self.keys[:, None], self.tokens], dim=1)
        samples = [torch.empty_like(sample) for _ in range(dist.get_world_size())]
        dist.all_gather(samples, sample)
        joint = torch.cat(samples)
        keys, tokens = _smallest(joint[:, 0], joint[:, 1:])
        return replace(self, counts=sums[:, 0], token_sums=sums[:, 1:], keys=keys, tokens=tokens)


def code_usage(
    x: Tensor,
    indices: Tensor,
    num_codes: int,
    updates: Tensor,
    pass_number: int,
    cosine: bool = False,
) -> CodeUsage:
    """Usage in one forward pass, by tokens whose square is finite.

    Args:
        x: (T, D) float32 tokens.
        indices: (T,) int64, their codes.
        num_codes: M.
        updates: How often the codebook has learned, 0-dim int64.
        pass_number: How many passes are in the usage that this one will be merged with.
        cosine: Of directions: tokens are made of length one.
    """
    usable = torch.linalg.vecdot(x, x).isfinite()
    x = x.masked_fill(~usable[:, None], 0)
    if cosine:
        x = F.normalize(x, dim=1, eps=NORM_EPS)
    counts = torch.zeros(num_codes, device=x.device).index_add(0, indices, usable.float())
    sums = torch.zeros(num_codes, x.shape[1], device=x.device).index_add(0, indices, x)
    keys = _random_keys(usable, updates, pass_number).masked_fill(~usable, SPOILT)
    return CodeUsage(counts, sums, *_smallest(keys, x), num_passes=int(x.shape[0] > 0))


def _random_keys(like: Tensor, updates: Tensor, pass_number: int) -> Tensor:
    """Uniform keys, new for each update, pass and rank."""
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    rows = torch.arange(like.shape[0], device=like.device)
    return random_uniform(rows, updates, pass_number, rank)


def _smallest(keys: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The S smallest keys and their tokens, filled up with infinite keys and zeros."""
    missing = SAMPLE_SIZE - keys.shape[0]
    if missing > 0:
        keys = torch.cat([keys, keys.new_full((missing,), torch.inf)])
        tokens = torch.cat([tokens, tokens.new_zeros(missing, tokens.shape[1])])
    smallest = keys.topk(SAMPLE_SIZE, largest=False)
    return smallest.values, tokens.index_select(0, smallest.indices)
