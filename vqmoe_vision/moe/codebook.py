"""Vector quantization: the nearest code of a token, and the plain codebook of VQ-VAE.

Legend: T tokens, D width, M codes.

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
import torch.nn.functional as F
from torch import Tensor, nn

from .routing import full_precision


@dataclass(frozen=True)
class Quantized:
    """Answer of a codebook.

    Args:
        codes: Nearest code of each token, (T, D) float32.
        indices: Its index, (T,) int64 in [0, M).
        loss: 0-dim float32 tensor, unweighted.
        error: Mean squared distance of tokens and codes per channel, 0-dim without gradient.
    """

    codes: Tensor
    indices: Tensor
    loss: Tensor
    error: Tensor


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


class Codebook(nn.Module):
    """Plain codebook of VQ-VAE: uniform start in (-1 / M, 1 / M), learned by gradient.

    It collapses easily: in transformers, whose tokens share a large mean, one code may win all.

    Args:
        num_codes: M.
        dim: D.
        commitment: Weight of the commitment term (beta).
    """

    codebook_scale = 1.0
    embed: Tensor

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
        self.factory: dict[str, Any] = {'device': device, 'dtype': dtype}
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
            # not codes[indices], whose backward is one thread's work: 12 ms at 8192 tokens, not 0.6
            chosen = codes.index_select(0, indices)
            error = _mean_squared(x, chosen.detach())
            loss = self.commitment * error
            if self.codebook_scale > 0:
                loss = loss + self.codebook_scale * _mean_squared(chosen, x.detach())
        return Quantized(chosen, indices, loss, error.detach())

    def observe(self, x: Tensor, indices: Tensor) -> Tensor | None:
        """Keep what the next `update` needs to know of a forward pass; here, nothing.

        Args:
            x: (T, D) tokens.
            indices: (T,) their codes.

        Returns:
            How many tokens had to be left out, 0-dim, or None if none ever are.
        """
        return None

    def discard(self) -> None:
        """Forget the observed passes."""

    def update(self) -> bool:
        """Learn from the observed passes of all ranks; returns whether the codes changed."""
        return False

    def extra_repr(self) -> str:
        """Sizes, for print(model)."""
        return f'num_codes={self.num_codes}, dim={self.dim}, commitment={self.commitment}'


def _mean_squared(a: Tensor, b: Tensor) -> Tensor:
    """Mean over tokens and channels, zero without tokens."""
    return F.mse_loss(a, b, reduction='sum') / max(a.numel(), 1)
