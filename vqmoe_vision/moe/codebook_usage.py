"""What a codebook learns from without gradients: how tokens use it, over passes and ranks.

The sample holds the S tokens with the smallest of independent random draws. So samples of passes
and ranks merge, and every token has the same chance. A draw is a function of counters and of the
token's place in the batch of all ranks: resumed runs and other numbers of processes draw alike.

Legend: T tokens, N tokens per sample, D width, M codes, S = SAMPLE_SIZE sampled tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .codebook import NORM_EPS
from .counted_random import random_integers
from .ranks import joint_rows, rank_and_size, sum_over_ranks

SAMPLE_SIZE = 1024  # tokens kept of all passes, for starting codes and replacing dead ones
SPOILT = 2**62  # the draw of a token that cannot be used, behind all others
NONE = 2**63 - 1  # the draw where there is no token


@dataclass(frozen=True)
class CodeUsage:
    """Counts, sums and a uniform sample of the tokens of any number of forward passes."""

    counts: Tensor  # (M,) float32, tokens per code
    token_sums: Tensor  # (M, D) float32
    draws: Tensor  # (S,) int64, rising; `SPOILT` if unusable, `NONE` without a token
    tokens: Tensor  # (S, D) float32, zeros where the draw is not below `SPOILT`
    num_passes: int = 1  # with tokens, on this rank

    @property
    def num_tokens(self) -> Tensor:
        """Tokens in all, 0-dim float32."""
        return self.counts.sum()

    @property
    def usable(self) -> Tensor:
        """Which rows of the sample are tokens, (S,) bool; the first ones, as draws rise."""
        return self.draws < SPOILT

    @property
    def seen(self) -> Tensor:
        """Whether there was any token, usable or not, 0-dim bool."""
        return self.draws[0] < NONE

    def merged(self, later: CodeUsage) -> CodeUsage:
        """Usage in the passes of both."""
        return CodeUsage(
            self.counts + later.counts,
            self.token_sums + later.token_sums,
            *_smallest(
                torch.cat([self.draws, later.draws]), torch.cat([self.tokens, later.tokens])
            ),
            self.num_passes + later.num_passes,
        )

    def over_ranks(self) -> CodeUsage:
        """Usage on all ranks; the same object in a single process."""
        rank, size = rank_and_size()
        if size == 1:
            return self
        sums = sum_over_ranks(torch.cat([self.counts[:, None], self.token_sums], dim=1))
        every = [torch.empty_like(self.draws) for _ in range(size)]
        dist.all_gather(every, self.draws)
        draws, places = torch.cat(every).topk(SAMPLE_SIZE, largest=False)
        # tokens travel by a sum, in which each is that of one rank: as many bytes for any number of
        # ranks, and as integers, whose bits nothing rounds
        places = places - rank * SAMPLE_SIZE
        is_own = (places >= 0) & (places < SAMPLE_SIZE)
        own = self.tokens.index_select(0, places.clamp(0, SAMPLE_SIZE - 1))
        bits = own.masked_fill(~is_own[:, None], 0).view(torch.int32)
        tokens = sum_over_ranks(bits).view(torch.float32)
        return replace(self, counts=sums[:, 0], token_sums=sums[:, 1:], draws=draws, tokens=tokens)


def code_usage(
    x: Tensor,
    indices: Tensor,
    num_codes: int,
    updates: Tensor,  # 0-dim int64, how often the codebook has learned
    pass_number: int,  # passes in the usage that this one is merged with
    cosine: bool = False,
    tokens_per_sample: int = 1,  # N
) -> CodeUsage:
    """Usage in one pass by tokens (T, D) float32, sample after sample, with codes (T,) int64."""
    # a token that is not finite when squared would spoil its code for ever
    usable = x.square().sum(dim=1).isfinite()  # autocast computes a product with itself in float16
    x = x.masked_fill(~usable[:, None], 0)
    if cosine:
        x = F.normalize(x, dim=1, eps=NORM_EPS)
    counts = torch.zeros(num_codes, device=x.device, dtype=torch.float32)
    counts = counts.index_add(0, indices, usable.float())
    sums = x.new_zeros(num_codes, x.shape[1]).index_add(0, indices, x)
    rows = joint_rows(x.shape[0], tokens_per_sample, x.device)
    draws = _random_draws(rows, updates, pass_number).masked_fill(~usable, SPOILT)
    return CodeUsage(counts, sums, *_smallest(draws, x), num_passes=int(x.shape[0] > 0))


def _random_draws(rows: Tensor, updates: Tensor, pass_number: int) -> Tensor:
    """31 random bits, new for each update and pass, before the row: no two draws are equal."""
    return (random_integers(rows, updates, pass_number, 0) >> 1 << 31) + rows


def _smallest(draws: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The S smallest draws and their tokens, filled up with `NONE` and zeros."""
    missing = SAMPLE_SIZE - draws.shape[0]
    if missing > 0:
        draws = torch.cat([draws, draws.new_full((missing,), NONE)])
        tokens = torch.cat([tokens, tokens.new_zeros(missing, tokens.shape[1])])
    smallest = draws.topk(SAMPLE_SIZE, largest=False)
    return smallest.values, tokens.index_select(0, smallest.indices)
