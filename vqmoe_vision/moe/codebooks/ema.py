"""Codebooks that learn without gradients: as averages of their tokens, or by moving unused codes.

An update reads nothing back from the device, so that a step on a GPU does not wait for it. What
depends on numbers is always computed, and chosen by `torch.where`.

EMA (VQ-VAE, appendix A.1), of counts n_k and token sums m_k, both averaged with `ema_decay`:

    v_k = m_k / n~_k,   n~_k = (n_k + eps) / (sum n + M eps) * sum n,   eps = 1e-5 of a token

There is no codebook loss. Averages are shares of the tokens: updates of any size count alike.

CVQ-VAE (arXiv 2307.15139): codes are learned by gradient, and those that are not used move. Usage
starts at zero and is averaged with `ema_decay`. Code k moves to an anchor by alpha_k =
exp(-10 usage_k M / (1 - ema_decay) - 0.001): fully if never used, not measurably if used. An anchor
is a token drawn with probability softmax(-distance^2) ('probrandom'). Where we differ: distances
are Euclidean, an option of the authors' code, whose default cosine leaves lengths as they are.

Legend: T tokens, D width, M codes.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..routing import ExactBuffers, full_precision
from . import Codebook, SimVQCodebook
from .usage import CodeUsage, anchor_probabilities, code_usage, kmeans, random_choice


class UsageCodebook(ExactBuffers, Codebook):
    """Base of codebooks that learn from how tokens use them; a subclass implements `_learn`."""

    OPTIONS = (*Codebook.OPTIONS, 'ema_decay')
    exact_buffers = ('usage', 'embed', 'token_sums')
    usage: Tensor
    started: Tensor
    updates: Tensor

    def __init__(self, num_codes: int, dim: int, ema_decay: float = 0.99, **options: Any) -> None:
        super().__init__(num_codes, dim, **options)
        self.ema_decay = ema_decay

    def _create(self, **factory: Any) -> None:
        super()._create(**factory)
        buffer = partial(torch.empty, device=factory.get('device'))
        self.register_buffer('usage', buffer(self.num_codes, dtype=torch.float32))
        self.register_buffer('started', buffer((), dtype=torch.bool))
        self.register_buffer('updates', buffer((), dtype=torch.int64))

    def _reset_usage(self, share: float) -> None:
        self.usage.fill_(share)
        self.started.fill_(False)
        self.updates.zero_()

    @torch.no_grad()
    def observe(self, x: Tensor, indices: Tensor, tokens_per_sample: int = 1) -> Tensor:
        """Keep statistics of tokens (T, D), codes (T,) for `update`; their memory does not grow."""
        before, x = self.pending, x.detach().float()
        number, codes = 0 if before is None else before.num_passes, self.num_codes
        cosine = self.use_cosine_sim
        seen = code_usage(x, indices, codes, self.updates, number, cosine, tokens_per_sample)
        self.pending = seen if before is None else before.merged(seen)
        return x.shape[0] - seen.num_tokens

    @torch.no_grad()
    def update(self) -> bool:
        """Learn from the observed passes of all ranks; returns whether the codes may change."""
        if self.pending is None:
            return False
        # without a token nothing is learned, but every rank has taken part
        usage, self.pending = self.pending.over_ranks(), None
        learns = usage.num_tokens > 0
        self.updates += learns
        with full_precision(usage.tokens):
            self._learn(usage, learns)
        return True

    def _learn(self, usage: CodeUsage, learns: Tensor) -> None:
        raise NotImplementedError

    def _average(self, average: Tensor, value: Tensor, learns: Tensor) -> None:
        average.lerp_(value.to(average.dtype), (learns * (1 - self.ema_decay)).to(average.dtype))

    def __getstate__(self) -> dict:
        return {**self.__dict__, 'pending': None}


def _replace(kept: Tensor, where: Tensor, values: Tensor) -> None:
    kept.copy_(torch.where(where, values.to(kept.dtype), kept))


class EmaCodebook(UsageCodebook):
    """Codes that follow the average of their tokens, start by k-means, and are replaced if dead."""

    OPTIONS = (*UsageCodebook.OPTIONS, 'dead_code_threshold')
    codebook_scale = 0.0
    token_sums: Tensor

    def __init__(
        self, num_codes: int, dim: int, dead_code_threshold: float = 0.01, **options: Any
    ) -> None:
        super().__init__(num_codes, dim, **options)
        self.dead_code_threshold = dead_code_threshold

    def _create(self, **factory: Any) -> None:
        super()._create(**factory)
        del self.embed  # no parameter
        exact = {**factory, 'dtype': torch.float32}
        for name in ('embed', 'token_sums'):
            self.register_buffer(name, torch.empty(self.num_codes, self.dim, **exact))

    def init_weights(self) -> None:
        """Random until the first update; token-sized, so that not all tokens take one code."""
        nn.init.normal_(self.embed)
        self.token_sums.zero_()
        self._reset_usage(1 / self.num_codes)
        # whether k-means may be due, as the host knows it: where averages of weights overwrite
        # `started` in place, it is computed once more and not taken over
        self._start_due = True

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if not self.started.is_meta:
            self._start_due = not bool(self.started)

    def no_weight_decay(self) -> set[str]:
        """Nothing: the codes are no parameter."""
        return set()

    def _learn(self, usage: CodeUsage, learns: Tensor) -> None:
        if self._start_due:
            # even without a usable token: `learns` decides on the device
            codes = kmeans(usage.tokens, self.num_codes, self.use_cosine_sim, usage.usable)
            # what has started before is not taken over, and learns even so
            starts, learns = learns & ~self.started, learns & self.started
            self._put(starts, codes)
            self.started |= starts
            # only unusable tokens: codes start without usage, for the next update to replace
            self.usage.masked_fill_(usage.seen & ~self.started, 0)
            self.started |= usage.seen
            # a rank that has seen no token does not know whether another has
            self._start_due = usage.num_passes == 0
        num_tokens = usage.num_tokens.clamp(min=1)
        self._average(self.usage, usage.counts / num_tokens, learns)
        self._average(self.token_sums, usage.token_sums / num_tokens, learns)
        total, epsilon = self.usage.sum(), 1e-5 / num_tokens
        smoothed = (self.usage + epsilon) / (total + self.num_codes * epsilon) * total
        _replace(self.embed, learns, self.token_sums / smoothed[:, None])
        if self.dead_code_threshold > 0:
            self._replace_dead(usage, learns)

    def _replace_dead(self, usage: CodeUsage, learns: Tensor) -> None:
        dead = self.usage * self.num_codes < self.dead_code_threshold
        # in turn: the first rows of the sample are tokens, in random order
        picks = (dead.cumsum(0) - 1) % usage.usable.sum().clamp(min=1)
        self._put(dead & learns, usage.tokens.index_select(0, picks))

    def _put(self, where: Tensor, codes: Tensor) -> None:
        """Begin anew with these codes (M, D) at even usage, where (M,) or () is true."""
        _replace(self.embed, where[..., None], codes)
        # even usage: not dead before it had a chance
        self.usage.masked_fill_(where, 1 / self.num_codes)
        sums = codes.to(self.token_sums.dtype) / self.num_codes
        _replace(self.token_sums, where[..., None], sums)


class CVQCodebook(UsageCodebook):
    """Online clustered codebook: codes learn by gradient, and unused ones move to anchors."""

    def init_weights(self) -> None:
        """The uniform start; zero usage, so that all codes move to tokens at once."""
        super().init_weights()
        self._reset_usage(0.0)

    def _learn(self, usage: CodeUsage, learns: Tensor) -> None:
        self._average(self.usage, usage.counts / usage.num_tokens.clamp(min=1), learns)
        rate = torch.exp(-self.usage * self.num_codes * 10 / (1 - self.ema_decay) - 1e-3)
        before = self.codes()
        probabilities = anchor_probabilities(before, usage.tokens, usage.usable)
        anchors = usage.tokens.index_select(0, random_choice(probabilities, self.updates))
        _replace(self.embed, learns, before.lerp(anchors, rate[:, None].float()))


CODEBOOKS: dict[str, type[Codebook]] = {
    'ema': EmaCodebook,
    'plain': Codebook,
    'simvq': SimVQCodebook,
    'cvq': CVQCodebook,
}
