"""Options of methods with a codebook."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..codebook import Codebook
from ..codebooks import CODEBOOKS
from ..config import MoeConfig, check_weights

_OPTIONS = {name for codebook in CODEBOOKS.values() for name in codebook.OPTIONS}
_LEARNING = sorted(_OPTIONS.difference(Codebook.OPTIONS))
_OF_DECAY = ('ema_bias_correction', 'ema_decay_warmup', 'usage_from_kmeans')


@dataclass(frozen=True, kw_only=True)
class CodebookConfig(MoeConfig):
    """Options of a codebook; `use_cosine_sim` and `rotation_trick` as in vector-quantize-pytorch.

    Args:
        codebook: 'ema', 'gradient' (both start by k-means and replace dead codes), 'plain'
            (VQ-VAE's), 'simvq' or 'cvq'.
        commitment: beta, weight of the commitment term, at least 0.
        use_cosine_sim: Compare tokens and codes by direction: both are made of length one.
        ema_decay: Of the averages of 'ema', 'gradient' and 'cvq', at least 0 and below 1.
        ema_decay_warmup: Let update n, from 0, have min(ema_decay, (1 + n) / (10 + n)).
        ema_bias_correction: Divide averages by 1 - ema_decay^t after t updates; without warm-up.
        dead_code_threshold: Share of even usage, from 0 (never) to below 1, under which 'ema' and
            'gradient' replace a code.
        usage_from_kmeans: Let codes of 'ema' and 'gradient' start with their shares in k-means.
        train_codebook: False keeps the codes as they are; tokens are still drawn to them.
    """

    NOT_OF_WEIGHTS: ClassVar[frozenset[str]] = frozenset(
        {
            'commitment',
            'ema_decay',
            'ema_decay_warmup',
            'ema_bias_correction',
            'dead_code_threshold',
            'usage_from_kmeans',
            'train_codebook',
        }
    )

    codebook: str = 'ema'
    commitment: float = 0.25
    use_cosine_sim: bool = False
    ema_decay: float = 0.99
    ema_decay_warmup: bool = False
    ema_bias_correction: bool = False
    dead_code_threshold: float = 0.01
    usage_from_kmeans: bool = False
    train_codebook: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require('codebook', self.codebook in CODEBOOKS, f'one of {sorted(CODEBOOKS)}')
        self.require('ema_decay', 0 <= self.ema_decay < 1, 'at least 0 and below 1')
        alone = not (self.ema_bias_correction and self.ema_decay_warmup)
        self.require('ema_bias_correction', alone, 'False with ema_decay_warmup=True, one of both')
        share = self.dead_code_threshold
        self.require('dead_code_threshold', 0 <= share < 1, 'at least 0 and below 1')
        check_weights(self, 'commitment')

    def unused(self) -> dict[str, str]:
        """What the codebook does not have."""
        missing = sorted(_OPTIONS.difference(CODEBOOKS[self.codebook].OPTIONS))
        unused = dict.fromkeys(missing, f'codebook={self.codebook!r}')
        if self.ema_decay == 0:
            unused |= dict.fromkeys(_OF_DECAY, 'ema_decay=0')
        if self.codebook == 'gradient' and self.dead_code_threshold == 0:
            # its averages tell dead codes, and nothing else
            averages = [name for name in _LEARNING if name != 'dead_code_threshold']
            unused |= dict.fromkeys(averages, 'dead_code_threshold=0')
        if not self.train_codebook:
            unused |= dict.fromkeys(_LEARNING, 'train_codebook=False')
        return unused

    def without_codebook_loss(self) -> str:
        """The value that leaves the loss its commitment term alone; empty if it has both terms."""
        if not self.train_codebook:
            return 'train_codebook=False'
        learned_by_loss = CODEBOOKS[self.codebook].codebook_scale > 0
        return '' if learned_by_loss else f'codebook={self.codebook!r}'

    def build_codebook(self, num_codes: int, dim: int, **factory: Any) -> Codebook:
        """The codebook, of M codes of width D.

        Args:
            num_codes: M.
            dim: D.
            **factory: `device` and `dtype`.
        """
        codebook = CODEBOOKS[self.codebook]
        options = {name: getattr(self, name) for name in codebook.OPTIONS}
        built = codebook(num_codes, dim, **options, **factory)
        return built if self.train_codebook else built.freeze()
