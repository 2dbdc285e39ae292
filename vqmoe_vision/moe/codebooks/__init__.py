"""Vector quantization: all codebooks by name."""

from __future__ import annotations

from .codebook import Codebook, Quantized, SimVQCodebook
from .ema import CVQCodebook, EmaCodebook

__all__ = ['CODEBOOKS', 'Codebook', 'Quantized']

CODEBOOKS: dict[str, type[Codebook]] = {
    'ema': EmaCodebook,
    'plain': Codebook,
    'simvq': SimVQCodebook,
    'cvq': CVQCodebook,
}
