"""Vector quantization: the nearest code of a token, and five ways to learn the codes.

Legend: T tokens, D width, M codes, S sample of tokens.

Every codebook has, in float32 and with autocast off (VQ-VAE, arXiv 1711.00937):

    q = argmin_j |x - v_j|^2
    loss = codebook_scale * mean |sg[x] - v_q|^2 + commitment * mean |x - sg[v_q]|^2

`forward` never changes a buffer: what a codebook learns without gradients it learns in `update`,
from statistics of the forward passes before it. Learning inside forward would give wrong gradients,
silently, under gradient checkpointing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .routing import expert_load, full_precision

SAMPLE_SIZE = 1024  # tokens kept of a forward pass, for starting codes and replacing dead ones
KMEANS_ITERATIONS = 10
DEAD_SHARE = 0.01  # a code is dead below this share of even usage


@dataclass(frozen=True)
class Quantized:
    """Answer of a codebook.

    Args:
        codes: Nearest code of each token, (T, D) float32.
        indices: Its index, (T,) int64 in [0, M).
        loss: 0-dim float32 tensor, unweighted.
    """

    codes: Tensor
    indices: Tensor
    loss: Tensor


@dataclass(frozen=True)
class UsageStats:
    """What `update` needs to know of forward passes.

    Args:
        usage: (M,) share of tokens per code.
        token_sums: (M, D) sum of each code's tokens over T.
        sample: (S, D) some of the tokens.
    """

    usage: Tensor
    token_sums: Tensor
    sample: Tensor


@torch.no_grad()
def nearest_code(x: Tensor, codes: Tensor) -> Tensor:
    """Index of the code with the smallest Euclidean distance; the first of equals.

    Args:
        x: (T, D) float32.
        codes: (M, D) float32.

    Returns:
        (T,) int64.
    """
    # |x|^2 is the same for every code; leaving it out makes this one matrix product
    return (codes.square().sum(dim=1) - 2 * F.linear(x, codes)).argmin(dim=1)


@torch.no_grad()
def kmeans(sample: Tensor, num_codes: int) -> Tensor:
    """Codes from k-means++ and Lloyd iterations, the same on every rank for the same sample.

    A cluster that loses all members keeps its mean. With fewer distinct tokens than codes some
    codes repeat.

    Args:
        sample: (S, D) float32.
        num_codes: M.

    Returns:
        (M, D).
    """
    # a generator of its own: starting a codebook leaves the user's random stream alone
    generator = torch.Generator().manual_seed(0)
    codes = sample[:1]
    for _ in range(num_codes - 1):
        distance = torch.cdist(sample, codes).min(dim=1).values.square().cpu() + 1e-12
        pick = torch.multinomial(distance, 1, generator=generator)
        codes = torch.cat([codes, sample[pick.to(sample.device)]])
    for _ in range(KMEANS_ITERATIONS):
        members = F.one_hot(nearest_code(sample, codes), num_codes).to(sample.dtype)
        counts = members.sum(dim=0)[:, None]
        codes = torch.where(counts > 0, members.t() @ sample / counts.clamp(min=1), codes)
    return codes


class Codebook(nn.Module):
    """Plain codebook of VQ-VAE: uniform start in (-1 / M, 1 / M), learned by gradient.

    It collapses easily: in transformers, whose tokens share a large mean, one code may win all.

    Args:
        num_codes: M.
        dim: D.
        commitment: Weight of the commitment term (beta).
    """

    codebook_scale = 1.0

    def __init__(
        self,
        num_codes: int,
        dim: int,
        commitment: float = 0.25,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_codes, self.dim, self.commitment = num_codes, dim, commitment
        self.factory = {'device': device, 'dtype': dtype}
        self._pending: list[UsageStats] = []
        self._create()
        self.init_weights()

    def _create(self) -> None:
        self.embed = nn.Parameter(torch.empty(self.num_codes, self.dim, **self.factory))

    def init_weights(self) -> None:
        """The paper's uniform start."""
        nn.init.uniform_(self.embed, -1 / self.num_codes, 1 / self.num_codes)

    def codes(self) -> Tensor:
        """Current codes, (M, D) float32."""
        return self.embed.float()

    def no_weight_decay(self) -> set[str]:
        """The codes: decay would pull them away from the tokens."""
        return {'embed'}

    def forward(self, x: Tensor) -> Quantized:
        """Quantize tokens (T, D)."""
        with full_precision(x):
            x = x.float()
            codes = self.codes()
            indices = nearest_code(x, codes)
            chosen = codes[indices]
            loss = self.commitment * F.mse_loss(x, chosen.detach())
            if self.codebook_scale > 0:
                loss = loss + self.codebook_scale * F.mse_loss(chosen, x.detach())
        return Quantized(chosen, indices, loss)

    @torch.no_grad()
    def observe(self, x: Tensor, indices: Tensor) -> None:
        """Keep statistics of a forward pass for the next `update`.

        Args:
            x: (T, D) tokens.
            indices: (T,) their codes.
        """
        x = x.detach().float()
        usage = expert_load(indices, self.num_codes)
        sums = torch.zeros(self.num_codes, self.dim, device=x.device).index_add(0, indices, x)
        stride = max(x.shape[0] // SAMPLE_SIZE, 1)
        stats = UsageStats(usage, sums / x.shape[0], x[::stride][:SAMPLE_SIZE].clone())
        self._pending.append(stats)

    def discard(self) -> None:
        """Forget the observed passes."""
        self._pending = []

    @torch.no_grad()
    def update(self) -> bool:
        """Learn from the observed passes of all ranks; returns whether the codes changed."""
        if not self._pending:
            return False
        passes, self._pending = self._pending, []
        stats = UsageStats(
            torch.stack([p.usage for p in passes]).mean(dim=0),
            torch.stack([p.token_sums for p in passes]).mean(dim=0),
            torch.cat([p.sample for p in passes])[:SAMPLE_SIZE],
        )
        return self._learn(over_ranks(stats))

    def _learn(self, stats: UsageStats) -> bool:
        return False

    def extra_repr(self) -> str:
        """Sizes, for print(model)."""
        return f'num_codes={self.num_codes}, dim={self.dim}, commitment={self.commitment}'

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_pending': []}


class GradientCodebook(Codebook):
    """Codes learned by gradient, with a k-means start and replacement of dead codes.

    Usage is a moving average of decay 0.99; a code below 1 % of even usage takes the place of a
    random token and starts again at even usage, so that it is not replaced before it had a chance.
    """

    decay = 0.99
    usage: Tensor
    started: Tensor

    def _create(self) -> None:
        super()._create()
        device = self.factory['device']
        self.register_buffer('usage', torch.empty(self.num_codes, device=device))
        self.register_buffer('started', torch.empty((), dtype=torch.bool, device=device))
        self.register_buffer('updates', torch.empty((), dtype=torch.int64, device=device))

    def init_weights(self) -> None:
        """The uniform start, until the first update replaces it; even usage."""
        super().init_weights()
        self._reset_usage(1 / self.num_codes)

    def _reset_usage(self, share: float) -> None:
        self.usage.fill_(share)
        self.started.fill_(False)
        self.updates.zero_()

    def _learn(self, stats: UsageStats) -> bool:
        self.updates += 1
        if not bool(self.started):
            self._start(kmeans(stats.sample, self.num_codes))
            return True
        self.usage.lerp_(stats.usage.to(self.usage.dtype), 1 - self.decay)
        return self._move(stats) | self._replace_dead(stats)

    def _start(self, codes: Tensor) -> None:
        self.embed.copy_(codes)
        self.usage.fill_(1 / self.num_codes)
        self.started.fill_(True)

    def _move(self, stats: UsageStats) -> bool:
        return False

    def _replace_dead(self, stats: UsageStats) -> bool:
        dead = self.usage * self.num_codes < DEAD_SHARE
        num_dead = int(dead.sum())
        if num_dead == 0:
            return False
        generator = torch.Generator().manual_seed(int(self.updates))  # the same on every rank
        picks = torch.randint(len(stats.sample), (num_dead,), generator=generator)
        self._revive(dead, stats.sample[picks.to(stats.sample.device)])
        return True

    def _revive(self, dead: Tensor, codes: Tensor) -> None:
        self.embed[dead] = codes.to(self.embed.dtype)
        self.usage[dead] = 1 / self.num_codes


class EmaCodebook(GradientCodebook):
    """Codes that follow the moving average of their tokens (VQ-VAE, appendix A.1).

    With usage n_k and token sums m_k as shares of all tokens, both averaged with decay 0.99:
    v_k = m_k / n~_k, n~_k = (n_k + eps) / (sum n + M eps) * sum n. There is no codebook loss.
    Starts and replaces dead codes as `GradientCodebook` does.
    """

    codebook_scale = 0.0
    epsilon = 1e-5

    def _create(self) -> None:
        super()._create()
        del self.embed
        shape = (self.num_codes, self.dim)
        self.register_buffer('embed', torch.empty(shape, **self.factory))
        self.register_buffer('token_sums', torch.empty(shape, **self.factory))

    def init_weights(self) -> None:
        """Random until the first update; token-sized, so that not all tokens take one code."""
        nn.init.normal_(self.embed)
        self.token_sums.zero_()
        self._reset_usage(1 / self.num_codes)

    def no_weight_decay(self) -> set[str]:
        """Nothing: the codes are no parameter."""
        return set()

    def _start(self, codes: Tensor) -> None:
        super()._start(codes)
        self.token_sums.copy_(codes / self.num_codes)

    def _move(self, stats: UsageStats) -> bool:
        self.token_sums.lerp_(stats.token_sums.to(self.token_sums.dtype), 1 - self.decay)
        total = self.usage.sum()
        smoothed = (self.usage + self.epsilon) / (total + self.num_codes * self.epsilon) * total
        self.embed.copy_(self.token_sums / smoothed[:, None])
        return True

    def _revive(self, dead: Tensor, codes: Tensor) -> None:
        super()._revive(dead, codes)
        self.token_sums[dead] = codes.to(self.token_sums.dtype) / self.num_codes


class SimVQCodebook(Codebook):
    """Frozen Gaussian codes seen through one learned linear layer (SimVQ, arXiv 2411.02038).

    Moving the layer for one selected code moves all codes, so that few are left behind. But it has
    no data-dependent start: a large mean that all tokens share still lets one code win all.
    """

    frozen_embed: Tensor

    def _create(self) -> None:
        self.register_buffer('frozen_embed', torch.empty(self.num_codes, self.dim, **self.factory))
        self.project = nn.Linear(self.dim, self.dim, **self.factory)

    def init_weights(self) -> None:
        """Standard deviation D^-1/2 for the codes, torch's default for the layer."""
        nn.init.normal_(self.frozen_embed, std=self.dim**-0.5)
        self.project.reset_parameters()

    def codes(self) -> Tensor:
        """Projected codes, (M, D) float32."""
        weight, bias = self.project.weight.float(), self.project.bias.float()
        return F.linear(self.frozen_embed.float(), weight, bias)

    def no_weight_decay(self) -> set[str]:
        """The projection: it is the codebook."""
        return {'project.weight'}


class CVQCodebook(GradientCodebook):
    """Online clustered codebook (CVQ-VAE, arXiv 2307.15139): unused codes move to anchors.

    Usage starts at zero and is averaged with decay 0.99. Code k moves by
    alpha_k = exp(-10 usage_k M / (1 - decay) - 0.001) towards an anchor, a token drawn with
    probability softmax(-distance) ('probrandom'): fully if never used, not measurably if used.
    """

    def init_weights(self) -> None:
        """The uniform start; zero usage, so that all codes move to tokens at once."""
        super().init_weights()
        self._reset_usage(0.0)

    def _learn(self, stats: UsageStats) -> bool:
        self.updates += 1
        self.usage.lerp_(stats.usage.to(self.usage.dtype), 1 - self.decay)
        rate = torch.exp(-self.usage * self.num_codes * 10 / (1 - self.decay) - 1e-3)
        generator = torch.Generator().manual_seed(int(self.updates))  # the same on every rank
        distance = torch.cdist(self.codes(), stats.sample)
        picks = torch.multinomial((-distance).softmax(dim=1).cpu(), 1, generator=generator)
        anchors = stats.sample[picks.squeeze(1).to(stats.sample.device)]
        self.embed.lerp_(anchors.to(self.embed.dtype), rate[:, None].to(self.embed.dtype))
        return True


CODEBOOKS: dict[str, type[Codebook]] = {
    'ema': EmaCodebook,
    'gradient': GradientCodebook,
    'plain': Codebook,
    'simvq': SimVQCodebook,
    'cvq': CVQCodebook,
}


def over_ranks(stats: UsageStats) -> UsageStats:
    """Mean usage and sums of all ranks, and rank 0's sample; unchanged in a single process."""
    if not (dist.is_available() and dist.is_initialized()):
        return stats
    shares = torch.cat([stats.usage[:, None], stats.token_sums], dim=1)
    dist.all_reduce(shares)
    shares /= dist.get_world_size()
    # ranks may have seen different numbers of tokens, a broadcast needs equal shapes
    size = torch.tensor(len(stats.sample), device=shares.device)
    dist.broadcast(size, src=0)
    sample = stats.sample.new_empty(int(size), stats.sample.shape[1])
    if dist.get_rank() == 0:
        sample.copy_(stats.sample)
    dist.broadcast(sample, src=0)
    return UsageStats(shares[:, 0], shares[:, 1:], sample)
