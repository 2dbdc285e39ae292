"""Vector quantization: all codebooks by name."""

from __future__ import annotations

from .codebook import Codebook, SimVQCodebook
from .ema import CVQCodebook, EmaCodebook

CODEBOOKS: dict[str, type[Codebook]] = {
    'ema': EmaCodebook,
    'plain': Codebook,
    'simvq': SimVQCodebook,
    'cvq': CVQCodebook,
}
