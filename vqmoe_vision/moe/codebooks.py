"""All codebooks by name."""

from __future__ import annotations

from .codebook import Codebook
from .codebook_cvq import CVQCodebook
from .codebook_learning import EmaCodebook, GradientCodebook
from .codebook_simvq import SimVQCodebook

CODEBOOKS: dict[str, type[Codebook]] = {
    'ema': EmaCodebook,
    'gradient': GradientCodebook,
    'plain': Codebook,
    'simvq': SimVQCodebook,
    'cvq': CVQCodebook,
}
