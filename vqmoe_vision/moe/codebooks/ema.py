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

Legend: T tokens, D width, M codes, L codebooks that learn together; in `_learn` all tensors are
those of L codebooks, (L, ...).
"""

import copy
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..routing import ExactBuffers, full_precision
from . import Codebook, SimVQCodebook
from .projected import ProjectedCodebook
from .usage import (
    CodeUsage,
    anchor_probabilities,
    code_usage,
    kmeans,
    random_choice,
    sampled,
    stream_of,
    together,
)


class UsageCodebook(ExactBuffers, Codebook):
    """Base of codebooks that learn from how tokens use them; a subclass implements `_learn`."""

    OPTIONS = (*Codebook.OPTIONS, 'ema_decay')
    exact_buffers = ('usage', 'embed', 'token_sums')
    usage: Tensor
    started: Tensor
    updates: Tensor
    stream: Tensor
    _start_due = False  # whether k-means may be due, as the host knows it

    def __init__(self, num_codes: int, dim: int, ema_decay: float = 0.99, **options: Any) -> None:
        super().__init__(num_codes, dim, **options)
        self.ema_decay = ema_decay

    def _create(self, **factory: Any) -> None:
        super()._create(**factory)
        buffer = partial(torch.empty, device=factory.get('device'))
        self.register_buffer('usage', buffer(self.num_codes, dtype=torch.float32))
        self.register_buffer('started', buffer((), dtype=torch.bool))
        self.register_buffer('updates', buffer((), dtype=torch.int64))
        # of the first pass of the next update; it follows from `updates`
        self.register_buffer('stream', buffer((), dtype=torch.int64), persistent=False)

    def _reset_usage(self, share: float) -> None:
        self.usage.fill_(share)
        self.started.fill_(False)
        self.stream.copy_(stream_of(self.updates.zero_(), 0, 0))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.stream = stream_of(self.updates, 0, 0)

    @torch.no_grad()
    def observe(self, x: Tensor, indices: Tensor, tokens_per_sample: int = 1) -> Tensor:
        """Keep statistics of tokens (T, D), codes (T,) for `update`; their memory does not grow."""
        before, x = self.pending, x.detach().float()
        number = 0 if before is None else before.num_passes
        stream = self.stream if number == 0 else stream_of(self.updates, number, 0)
        seen = code_usage(
            x, indices, self.num_codes, stream, self.use_cosine_sim, tokens_per_sample
        )
        self.pending = seen if before is None else before.merged(seen)
        return x.shape[0] - seen.num_tokens

    def update(self) -> bool:
        """Learn from the observed passes of all ranks; returns whether the codes may change."""
        return update_together([self])[0]

    def _kind(self) -> tuple:
        """What codebooks have in common that learn together."""
        options = [getattr(self, name) for name in self.OPTIONS]
        return type(self), self.embed.shape, self.embed.dtype, self.embed.device, *options

    def _learn(self, usage: CodeUsage, learns: Tensor) -> None:
        raise NotImplementedError

    def _average(self, average: Tensor, value: Tensor, learns: Tensor) -> None:
        weight = (learns * (1 - self.ema_decay)).to(average.dtype)
        average.lerp_(value.to(average.dtype), _beside(weight, average))

    def __getstate__(self) -> dict:
        return {**self.__dict__, 'pending': None}


@torch.no_grad()
def update_together(books: Sequence[Codebook]) -> list[bool]:
    """`update` of all codebooks of a model: those alike learn as one, in few operators."""
    alike: dict[tuple, list[Any]] = defaultdict(list)
    for book in books:
        if isinstance(book, UsageCodebook) and book.pending is not None:
            alike[book._kind()].append(book)
    observed = [book.pending is not None for book in books]
    for group in alike.values():
        # without a token nothing is learned, but every rank has taken part
        usage = together([book.pending for book in group]).over_ranks()
        joint = copy.copy(group[0])
        names = [*joint._buffers, *joint._parameters]
        found = {name: [getattr(book, name).detach() for book in group] for name in names}
        joint.__dict__.update(_buffers={}, _parameters={})
        joint.__dict__.update({name: torch.stack(each) for name, each in found.items()})
        joint._start_due = any(book._start_due for book in group)
        learns = usage.num_tokens > 0
        joint.updates += learns
        joint.stream = stream_of(joint.updates, 0, 0)
        with full_precision(usage.tokens):
            joint._learn(usage, learns)
        for name, each in found.items():
            torch._foreach_copy_(each, [*getattr(joint, name).unbind()])
        for book in group:
            # a rank that has seen no token does not know whether another has
            book._start_due = book._start_due and book.pending.num_passes == 0
            book.pending = None
    return observed


def _beside(of_books: Tensor, values: Tensor) -> Tensor:
    """Numbers (L,), or of a single codebook (), beside values (L, ...)."""
    return of_books.view(*of_books.shape, *(1,) * (values.ndim - of_books.ndim))


def _replace(kept: Tensor, where: Tensor, values: Tensor) -> None:
    torch.where(_beside(where, kept), values.to(kept.dtype), kept, out=kept)


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
        # where averages of weights overwrite `started` in place, k-means is computed once more and
        # not taken over
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
            parts = zip(usage.tokens, usage.usable, strict=True)
            start = [kmeans(s, self.num_codes, self.use_cosine_sim, u) for s, u in parts]
            codes = torch.stack(start)
            # what has started before is not taken over, and learns even so
            starts, learns = learns & ~self.started, learns & self.started
            self._put(starts, codes)
            self.started |= starts
            # only unusable tokens: codes start without usage, for the next update to replace
            self.usage.masked_fill_((usage.seen & ~self.started)[:, None], 0)
            self.started |= usage.seen
        num_tokens = usage.num_tokens.clamp(min=1)[:, None]
        self._average(self.usage, usage.counts / num_tokens, learns)
        self._average(self.token_sums, usage.token_sums / num_tokens[..., None], learns)
        total, epsilon = self.usage.sum(dim=-1, keepdim=True), 1e-5 / num_tokens
        smoothed = (self.usage + epsilon) / (total + self.num_codes * epsilon) * total
        _replace(self.embed, learns, self.token_sums / smoothed[..., None])
        if self.dead_code_threshold > 0:
            self._replace_dead(usage, learns)

    def _replace_dead(self, usage: CodeUsage, learns: Tensor) -> None:
        dead = self.usage * self.num_codes < self.dead_code_threshold
        # in turn: the first rows of the sample are tokens, in random order
        number = usage.usable.sum(dim=-1, keepdim=True).clamp(min=1)
        picks = (dead.cumsum(dim=-1) - 1) % number
        self._put(dead & learns[:, None], sampled(usage.tokens, picks))

    def _put(self, where: Tensor, codes: Tensor) -> None:
        """Begin anew with codes (..., M, D) at even usage, where (..., M) or (...) is true."""
        _replace(self.embed, where, codes)
        # even usage: not dead before it had a chance
        self.usage.masked_fill_(_beside(where, self.usage), 1 / self.num_codes)
        _replace(self.token_sums, where, codes.to(self.token_sums.dtype) / self.num_codes)


class CVQCodebook(UsageCodebook):
    """Online clustered codebook: codes learn by gradient, and unused ones move to anchors."""

    def init_weights(self) -> None:
        """The uniform start; zero usage, so that all codes move to tokens at once."""
        super().init_weights()
        self._reset_usage(0.0)

    def _learn(self, usage: CodeUsage, learns: Tensor) -> None:
        self._average(self.usage, usage.counts / usage.num_tokens.clamp(min=1)[:, None], learns)
        rate = torch.exp(-self.usage * self.num_codes * 10 / (1 - self.ema_decay) - 1e-3)
        before = self.codes()
        probabilities = anchor_probabilities(before, usage.tokens, usage.usable)
        parts = zip(probabilities, self.updates, strict=True)
        picks = torch.stack([random_choice(shares, updates) for shares, updates in parts])
        moved = before.lerp(sampled(usage.tokens, picks), rate[..., None].float())
        _replace(self.embed, learns, moved)


CODEBOOKS: dict[str, type[Codebook]] = {
    'ema': EmaCodebook,
    'plain': Codebook,
    'simvq': SimVQCodebook,
    'cvq': CVQCodebook,
    'projected': ProjectedCodebook,
}
