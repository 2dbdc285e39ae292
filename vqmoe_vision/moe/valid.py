"""Which tokens of a batch are there: images of different sizes are padded to one length.

Legend: B images, N tokens per image with padding, T tokens that are there, of all images.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class ValidTokens(NamedTuple):
    """The tokens of a padded batch that are there, image after image."""

    mask: Tensor  # (B, N) bool
    places: Tensor  # (T,) int64 in [0, B * N)
    numbers: tuple[int, ...]  # of each image

    @classmethod
    @torch.compiler.disable
    def of(cls, mask: Tensor) -> 'ValidTokens':
        """Those of a mask (B, N) bool; here alone the host waits for the device, once a pass."""
        numbers = mask.sum(dim=1).tolist()
        return cls(mask, positions(mask, sum(numbers)), tuple(numbers))

    def take(self, x: Tensor) -> Tensor:
        """What they have of (B, N, ...), (T, ...)."""
        return x.flatten(0, 1).index_select(0, self.places)

    def put(self, tokens: Tensor) -> Tensor:
        """Each at its place, and zeros as padding; (T, D) -> (B, N, D)."""
        padded = tokens.new_zeros(self.mask.numel(), tokens.shape[1])
        return padded.index_copy(0, self.places, tokens).view(*self.mask.shape, -1)

    def one_by_one(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The answers (B, N, D) of what decides for each token alone, which is an image to it."""
        return self.put(run(self.take(x)[:, None])[:, 0])  # (T, 1, D)


def positions(mask: Tensor, number: int) -> Tensor:
    """Where a mask is true, (number,) int64, of its flat form; nothing is read back."""
    return mask.flatten().nonzero_static(size=number).flatten()
