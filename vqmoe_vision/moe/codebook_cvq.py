"""CVQ-VAE's codebook (arXiv 2307.15139): codes that are not used move to tokens.

Usage starts at zero and is averaged with `ema_decay`. Code k moves to an anchor by
alpha_k = exp(-10 usage_k M / (1 - ema_decay) - 0.001): fully if never used, not measurably if used.
An anchor is a token drawn with probability softmax(-distance^2) ('probrandom').

Where we differ: distances are Euclidean, an option of the authors' code. Its default, the cosine,
leaves codes and anchors as long as they are; `use_cosine_sim` makes them of length one.

Legend: M codes.
"""

from __future__ import annotations

import torch

from .codebook_learning import GradientCodebook
from .codebook_sample import anchor_probabilities
from .codebook_usage import CodeUsage
from .counted_random import random_choice


class CVQCodebook(GradientCodebook):
    """Online clustered codebook: unused codes move to anchors."""

    # no code is dead: what is not used moves, from the first update on
    OPTIONS = tuple(
        name
        for name in GradientCodebook.OPTIONS
        if name not in ('dead_code_threshold', 'usage_from_kmeans')
    )

    def init_weights(self) -> None:
        """The uniform start; zero usage, so that all codes move to tokens at once."""
        super().init_weights()
        self._reset_usage(0.0)

    def _learn(self, usage: CodeUsage) -> bool:
        learns = usage.num_tokens > 0
        self.updates += learns
        self._average(self.usage, usage.counts / usage.num_tokens.clamp(min=1), learns)
        rate = torch.exp(-self.usage * self.num_codes * 10 / (1 - self.ema_decay) - 1e-3)
        before = self.codes()
        probabilities = anchor_probabilities(before, usage.tokens, usage.usable)
        anchors = usage.tokens.index_select(0, random_choice(probabilities, self.updates))
        moved = before.lerp(anchors, rate[:, None].float()).to(self.embed.dtype)
        self.embed.copy_(torch.where(learns, moved, self.embed))
        return True
