"""How tokens use a codebook, over passes and ranks, and what is made of a sample of them.

The sample holds the S tokens with the smallest of independent random draws. So samples of passes
and ranks merge, and every token has the same chance. A draw is a function of counters and of the
token's place in the batch of all ranks: resumed runs and other numbers of processes draw alike.
Nothing is read back from the device, every rank finds the same, and the user's random stream is
left alone.

Random numbers are functions of counters, after "Parallel Random Numbers: As Easy as 1, 2, 3"
(Salmon et al., SC 2011): torch's generators take their seed from the host, which would wait for
one that is model state. The mixing function is [16 21f0aaad 15 735a2d97 15] of hash-prospector
(Wellons, on GitHub, issue 19). In int64 no product overflows, as multipliers are below 2^31.

Legend: T tokens, N tokens per sample, D width, M codes, S = SAMPLE_SIZE sampled tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..distributed import joint_rows, rank_and_size, sum_over_ranks
from ..routing import full_precision
from . import NORM_EPS, nearest_code

SAMPLE_SIZE = 1024  # tokens kept of all passes, for starting codes and replacing dead ones
SPOILT = 2**62  # the draw of a token that cannot be used, behind all others
NONE = 2**63 - 1  # the draw where there is no token
KMEANS_ITERATIONS = 10
_MASK = 2**32 - 1


@dataclass(frozen=True)
class CodeUsage:
    """Counts, sums and a uniform sample of the tokens of any number of forward passes.

    Those of L codebooks stand together in tensors (L, ...).
    """

    counts: Tensor  # (M,) float32, tokens per code
    token_sums: Tensor  # (M, D) float32
    draws: Tensor  # (S,) int64, rising; `SPOILT` if unusable, `NONE` without a token
    tokens: Tensor  # (S, D) float32, zeros where the draw is not below `SPOILT`
    num_passes: int = 1  # with tokens, on this rank

    @property
    def num_tokens(self) -> Tensor:
        """Tokens in all, 0-dim or (L,) float32."""
        return self.counts.sum(dim=-1)

    @property
    def usable(self) -> Tensor:
        """Which rows of the sample are tokens, (S,) bool; the first ones, as draws rise."""
        return self.draws < SPOILT

    @property
    def seen(self) -> Tensor:
        """Whether there was any token, usable or not, 0-dim or (L,) bool."""
        return self.draws[..., 0] < NONE

    def merged(self, later: 'CodeUsage') -> 'CodeUsage':
        """Usage in the passes of both."""
        return CodeUsage(
            self.counts + later.counts,
            self.token_sums + later.token_sums,
            *_smallest(
                torch.cat([self.draws, later.draws]), torch.cat([self.tokens, later.tokens])
            ),
            self.num_passes + later.num_passes,
        )

    def over_ranks(self) -> 'CodeUsage':
        """Usage on all ranks; the same object in a single process."""
        rank, size = rank_and_size()
        if size == 1:
            return self
        sums = sum_over_ranks(torch.cat([self.counts[..., None], self.token_sums], dim=-1))
        every = [torch.empty_like(self.draws) for _ in range(size)]
        dist.all_gather(every, self.draws)
        draws, places = torch.cat(every, dim=-1).topk(SAMPLE_SIZE, largest=False)
        # tokens travel by a sum, in which each is that of one rank: as many bytes for any number of
        # ranks, and as integers, whose bits nothing rounds
        places = places - rank * SAMPLE_SIZE
        is_own = (places >= 0) & (places < SAMPLE_SIZE)
        own = sampled(self.tokens, places.clamp(0, SAMPLE_SIZE - 1))
        bits = own.masked_fill(~is_own[..., None], 0).view(torch.int32)
        tokens = sum_over_ranks(bits).view(torch.float32)
        counts, token_sums = sums[..., 0], sums[..., 1:]
        return replace(self, counts=counts, token_sums=token_sums, draws=draws, tokens=tokens)


def together(usages: Sequence[CodeUsage]) -> CodeUsage:
    """Usage of several codebooks, as one of tensors (L, ...); the passes are those of the first."""
    names = ('counts', 'token_sums', 'draws', 'tokens')
    stacked: Any = {name: torch.stack([getattr(usage, name) for usage in usages]) for name in names}
    return replace(usages[0], **stacked)


def sampled(tokens: Tensor, places: Tensor) -> Tensor:
    """Tokens (..., S, D) at places (..., M), (..., M, D)."""
    return tokens.gather(-2, places[..., None].expand(*places.shape, tokens.shape[-1]))


def code_usage(
    x: Tensor,
    indices: Tensor,
    num_codes: int,
    stream: Tensor,  # 0-dim int64, of random numbers: see `stream_of`
    cosine: bool = False,
    tokens_per_sample: int = 1,  # N
) -> CodeUsage:
    """Usage in one pass by tokens (T, D) float32, sample after sample, with codes (T,) int64."""
    # a token that is not finite when squared would spoil its code for ever
    usable = torch.linalg.vector_norm(x, dim=1) < torch.inf
    spoilt = ~usable
    counted = usable.to(x.dtype)[:, None]
    # on a CPU a mask over rows takes five times as long
    x = x.nan_to_num(0, 0, 0).mul_(counted)
    if cosine:
        x = F.normalize(x, dim=1, eps=NORM_EPS)
    own = indices[:, None] == torch.arange(num_codes, device=x.device)
    members = own * counted
    with full_precision(x):
        # a product adds in one order, where `index_add` on a GPU has another in every run
        sums = members.t() @ x
    if torch.compiler.is_compiling() or type(x) is not Tensor:  # without data, as `FakeTensor`
        rows = joint_rows(x.shape[0], tokens_per_sample, x.device)
        numbers = _random_integers(rows, stream, 0)
    else:
        rows, mixed = _mixed_rows(x.shape[0], tokens_per_sample, rank_and_size(), x.device)
        numbers = _mix_(mixed + stream)
    # 31 random bits, new for each update and pass, before the row: no two draws are equal
    draws = rows.add(numbers >> 1, alpha=2**31).masked_fill(spoilt, SPOILT)
    return CodeUsage(members.sum(dim=0), sums, *_smallest(draws, x), int(x.shape[0] > 0))


@lru_cache(maxsize=4)
def _mixed_rows(
    num_tokens: int, tokens_per_sample: int, _: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """As `joint_rows`, and these mixed as `_numbers` does: the same at every step."""
    rows = joint_rows(num_tokens, tokens_per_sample, device)
    return rows, _mix_(rows.clone())


def _smallest(draws: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The S smallest draws and their tokens, filled up with `NONE` and zeros."""
    missing = SAMPLE_SIZE - draws.shape[0]
    if missing > 0:
        draws = torch.cat([draws, draws.new_full((missing,), NONE)])
        tokens = torch.cat([tokens, tokens.new_zeros(missing, tokens.shape[1])])
    smallest = draws.topk(SAMPLE_SIZE, largest=False)
    return smallest.values, tokens.index_select(0, smallest.indices)


@torch.no_grad()
def kmeans(
    sample: Tensor, num_codes: int, cosine: bool = False, usable: Tensor | None = None
) -> Tensor:
    """Codes (M, D) of a sample (S, D) by k-means++ and Lloyd, of length one if `cosine`."""
    usable = torch.ones_like(sample[:, 0], dtype=torch.bool) if usable is None else usable
    codes = _spread(sample, num_codes, usable)
    numbers = torch.arange(num_codes, device=sample.device)
    with full_precision(sample):
        for _ in range(KMEANS_ITERATIONS):  # to the mean of those that are nearest to each code
            own = (nearest_code(sample, codes)[:, None] == numbers) & usable[:, None]
            members = own.to(sample.dtype)
            counts = members.sum(dim=0)[:, None]
            means = members.t() @ sample / counts.clamp(min=1)
            if cosine:
                means = F.normalize(means, dim=1, eps=NORM_EPS)
            codes = torch.where(counts > 0, means, codes)  # a code without members stays
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


def anchor_probabilities(codes: Tensor, sample: Tensor, usable: Tensor) -> Tensor:
    """How likely CVQ draws a token as a code's anchor, (M, S): softmax(-distance^2)."""
    distances = torch.cdist(codes, sample).square()
    distances = distances.masked_fill(~usable[..., None, :], torch.inf)
    return distances.neg().softmax(dim=-1)  # nan if none is usable


def random_integers(rows: Tensor, *counters: Tensor | int) -> Tensor:
    """Uniform int64 in [0, 2^32) for rows in [0, 2^32) of any shape; counters name the stream."""
    stream = stream_of(*counters)
    is_tensor = isinstance(stream, Tensor)
    return _random_integers(rows, stream if is_tensor else None, 0 if is_tensor else stream)


def random_choice(weights: Tensor, *counters: Tensor | int) -> Tensor:
    """Index (...) of one in each row of weights (..., S), at least 0, in proportion to them."""
    rows = torch.arange(weights.numel(), device=weights.device).view(weights.shape)
    # never 0, and fine near 0, where the first clocks ring
    uniform = (random_integers(rows, *counters).float() + 0.5) * 2.0**-32
    # it may round to 1: such a clock rings last, but still before those that never do
    # exponential clocks, and the first to ring: no sums, which differ between runs on a GPU
    return torch.where(weights > 0, weights / -torch.log1p(-uniform), -1.0).argmax(dim=-1)


def stream_of(*counters: Tensor | int) -> Any:
    """Which random numbers counters name, by their order and 32 bits of each: an int or a tensor.

    The first counter may be an int64 tensor.
    """
    # as many counters as there are: zeros would stay zero, and be one stream however many they are;
    # mixed, or one counter would be mixed as rows are, and row and counter could change places
    stream: Any = _mix_(len(counters))
    for counter in counters:
        # of a tensor that 0 is added to, `_mix_` takes its place
        stream = _mix_(stream if isinstance(counter, int) and counter == 0 else counter + stream)
    return stream


def _numbers(rows: Tensor, stream: Tensor | None, number: int) -> Tensor:
    """Of the rows of a stream, which is a tensor or a number."""
    # rows are mixed before too: else two streams that are near would be one, shifted by a few rows
    return _mix_(_mix_(rows.clone()).add_(number if stream is None else stream))


def _mix_(value: Any) -> Any:
    """Of an integer, or of a tensor in its place."""
    value &= _MASK
    value ^= value >> 16
    value *= 0x21F0AAAD
    value &= _MASK
    value ^= value >> 15
    value *= 0x735A2D97
    value &= _MASK
    value ^= value >> 15
    return value


# One opaque operator: in a compiled model this arithmetic made a kernel of each layer, whose
# compilation took as long as that of all else in the layer. It runs as it is on tensors without
# data, where it would fail if it read something back.
_random_integers = torch.library.custom_op(
    'vqmoe_vision::mixed_integers', _numbers, mutates_args=()
)
_random_integers.register_fake(_numbers)
