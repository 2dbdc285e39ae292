"""Codebooks whose codes learn: by gradient, or as averages of their tokens.

An update reads nothing back from the device, so that a step on a GPU does not wait for it. What
depends on numbers is always computed, and chosen by `torch.where`.

EMA (VQ-VAE, appendix A.1), of counts n_k and token sums m_k, both averaged with `ema_decay`:

    v_k = m_k / n~_k,   n~_k = (n_k + eps) / (sum n + M eps) * sum n,   eps = 1e-5 of a token

There is no codebook loss. Averages are shares of the tokens: updates of any size count alike.

Legend: T tokens, D width, M codes.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .codebook import Codebook
from .codebook_sample import code_shares, kmeans
from .codebook_usage import CodeUsage, code_usage
from .routing import full_precision


class GradientCodebook(Codebook):
    """Codes learned by gradient, with a k-means start and replacement of dead codes."""

    OPTIONS: ClassVar[tuple[str, ...]] = (
        *Codebook.OPTIONS,
        'ema_decay',
        'ema_decay_warmup',
        'ema_bias_correction',
        'dead_code_threshold',
        'usage_from_kmeans',
    )
    _pending: CodeUsage | None = None
    usage: Tensor
    started: Tensor
    updates: Tensor

    def __init__(
        self,
        num_codes: int,
        dim: int,
        commitment: float = 0.25,
        use_cosine_sim: bool = False,
        ema_decay: float = 0.99,
        ema_decay_warmup: bool = False,
        ema_bias_correction: bool = False,
        dead_code_threshold: float = 0.01,
        usage_from_kmeans: bool = False,
        **factory: Any,
    ) -> None:
        super().__init__(num_codes, dim, commitment, use_cosine_sim, **factory)
        self.ema_decay, self.ema_decay_warmup = ema_decay, ema_decay_warmup
        self.ema_bias_correction = ema_bias_correction
        self.dead_code_threshold = dead_code_threshold
        self.usage_from_kmeans = usage_from_kmeans

    def _create(self) -> None:
        super()._create()
        device = self.factory['device']
        usage = torch.empty(self.num_codes, device=device, dtype=torch.float32)
        self.register_buffer('usage', usage)
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
        # whether k-means may be due, as the host knows it: where averages of weights overwrite
        # `started` in place, it is computed once more and not taken over
        self._start_due = True

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if not self.started.is_meta:
            self._start_due = not bool(self.started)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's, but averages stay as exact as they are: 16 bits round their steps away."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(*args, **kwargs)
        for name, buffer in self.named_buffers(recurse=False):
            if buffer.is_floating_point() and buffer.itemsize < 4:
                self._buffers[name] = before[name].to(buffer.device)
        return self

    @torch.no_grad()
    def observe(self, x: Tensor, indices: Tensor, tokens_per_sample: int = 1) -> Tensor:
        """Keep statistics of tokens (T, D), codes (T,) for `update`; their memory does not grow."""
        before = self._pending
        number = 0 if before is None else before.num_passes
        x = x.detach().float()
        cosine = self.use_cosine_sim
        seen = code_usage(
            x, indices, self.num_codes, self.updates, number, cosine, tokens_per_sample
        )
        self._pending = seen if before is None else before.merged(seen)
        return x.shape[0] - seen.num_tokens

    def discard(self) -> None:
        """Forget the observed passes."""
        self._pending = None

    @property
    def observed(self) -> dict[str, Any]:
        """What passes have left for the next `update`, as `CodeUsage`; {} if there were none."""
        return {} if self._pending is None else dict(vars(self._pending))

    @observed.setter
    def observed(self, usage: dict[str, Any]) -> None:
        device = self.updates.device
        moved: dict[str, Any] = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in usage.items()
        }
        self._pending = CodeUsage(**moved) if moved else None

    @torch.no_grad()
    def update(self) -> bool:
        """Learn from the observed passes of all ranks; returns whether the codes may change."""
        if self._pending is None:
            return False
        # without a token nothing is learned, but every rank has taken part
        usage, self._pending = self._pending.over_ranks(), None
        with full_precision(usage.tokens):
            return self._learn(usage)

    def _learn(self, usage: CodeUsage) -> bool:
        learns = usage.num_tokens > 0
        self.updates += learns
        starts = self._start_due
        if starts:
            # even without a usable token: `learns` decides on the device
            codes = kmeans(usage.tokens, self.num_codes, self.use_cosine_sim, usage.usable)
            begins = learns & ~self.started
            learns = self._start(codes, learns)
            if self.usage_from_kmeans:
                self._weigh(begins, code_shares(usage.tokens, codes, usage.usable))
            # only unusable tokens: codes start without usage, for the next update to replace
            self.usage.masked_fill_(usage.seen & ~self.started, 0)
            self.started |= usage.seen
            # a rank that has seen no token does not know whether another has
            self._start_due = usage.num_passes == 0
        self._average(self.usage, usage.counts / usage.num_tokens.clamp(min=1), learns)
        moves = self._move(usage, learns)
        replaces = self._replace_dead(usage, learns)
        return starts or moves or replaces

    def _average(self, average: Tensor, value: Tensor, learns: Tensor) -> None:
        rate = learns * (1 - self._decay())
        average.lerp_(value.to(average.dtype), rate.to(average.dtype))

    def _decay(self) -> Tensor | float:
        decay = self.ema_decay
        if self.ema_bias_correction:
            # what takes the corrected average of t - 1 updates to that of t (Adam, sonnet's VQ)
            return (1 - (1 - decay) / (1 - decay**self.updates)).clamp(min=0)
        if not self.ema_decay_warmup:
            return decay
        # TensorFlow's ExponentialMovingAverage with `num_updates`
        before = self.updates - 1
        return ((1 + before) / (10 + before)).clamp(max=decay)

    def _start(self, codes: Tensor, learns: Tensor) -> Tensor:
        """Take over codes unless there was a start before; returns whether to learn even so."""
        starts, again = learns & ~self.started, learns & self.started
        self._put(starts, codes)
        self.started |= learns
        return again

    def _weigh(self, begins: Tensor, shares: Tensor) -> None:
        """Let codes that begin, 0-dim bool, count as these shares of the tokens (M,)."""
        self.usage.copy_(torch.where(begins, shares.to(self.usage.dtype), self.usage))

    def _move(self, usage: CodeUsage, learns: Tensor) -> bool:
        return False

    def _replace_dead(self, usage: CodeUsage, learns: Tensor) -> bool:
        if self.dead_code_threshold == 0:
            return False
        dead = self.usage * self.num_codes < self.dead_code_threshold
        # in turn: the first rows of the sample are tokens, in random order
        picks = (dead.cumsum(0) - 1) % usage.usable.sum().clamp(min=1)
        self._put(dead & learns, usage.tokens.index_select(0, picks))
        return True

    def _put(self, where: Tensor, codes: Tensor) -> None:
        """Begin anew with these codes (M, D) at even usage, where (M,) or () is true."""
        self.embed.copy_(torch.where(where[..., None], codes.to(self.embed.dtype), self.embed))
        # even usage: not dead before it had a chance
        self.usage.masked_fill_(where, 1 / self.num_codes)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_pending': None}


class EmaCodebook(GradientCodebook):
    """Codes that follow the moving average of their tokens; start and dead codes as in its base."""

    codebook_scale = 0.0
    token_sums: Tensor
    epsilon = 1e-5

    def _create(self) -> None:
        super()._create()
        del self.embed
        exact = {'device': self.factory['device'], 'dtype': torch.float32}
        for name in ('embed', 'token_sums'):
            self.register_buffer(name, torch.empty(self.num_codes, self.dim, **exact))

    def init_weights(self) -> None:
        """Random until the first update; token-sized, so that not all tokens take one code."""
        nn.init.normal_(self.embed)
        self.token_sums.zero_()
        self._reset_usage(1 / self.num_codes)

    def no_weight_decay(self) -> set[str]:
        """Nothing: the codes are no parameter."""
        return set()

    def _move(self, usage: CodeUsage, learns: Tensor) -> bool:
        num_tokens = usage.num_tokens.clamp(min=1)
        self._average(self.token_sums, usage.token_sums / num_tokens, learns)
        total, epsilon = self.usage.sum(), self.epsilon / num_tokens
        smoothed = (self.usage + epsilon) / (total + self.num_codes * epsilon) * total
        moved = (self.token_sums / smoothed[:, None]).to(self.embed.dtype)
        self.embed.copy_(torch.where(learns, moved, self.embed))
        return True

    def _put(self, where: Tensor, codes: Tensor) -> None:
        super()._put(where, codes)
        sums = codes.to(self.token_sums.dtype) / self.num_codes
        self.token_sums.copy_(torch.where(where[..., None], sums, self.token_sums))

    def _weigh(self, begins: Tensor, shares: Tensor) -> None:
        super()._weigh(begins, shares)
        sums = (self.embed * shares[:, None]).to(self.token_sums.dtype)
        self.token_sums.copy_(torch.where(begins, sums, self.token_sums))
