"""How consistently experts are chosen: for what share of tokens a changed image changes the expert.

Experts are compared patch by patch, where the same patch can be found in both images; class and
register tokens are left out. All images are whole patches of pixels in 256 steps, before and after.

Legend: B images, C channels, H height, W width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vqmoe_vision.models.layers import Transformer
from vqmoe_vision.models.normalization import Normalization
from vqmoe_vision.moe.config import check

from .measures import changed_share
from .record import decided, on_patches


@dataclass(frozen=True)
class Shift:
    """A way to change images."""

    name: str  # with its severity: 'gaussian_noise 3'
    # pixels (B, C, H, W) in [0, 1], the index of the first image, and the size of a patch
    change: Callable[[Tensor, int, tuple[int, int]], Tensor]
    # maps (B, rows, columns) before and after, to what is the same patch in both
    align: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda before, after: (before, after)


def flip() -> Shift:
    """Left and right change places; every patch is compared with its mirror image."""
    return Shift(
        'flip',
        lambda pixels, first, patch: pixels.flip(-1),
        lambda before, after: (before, after.flip(-1)),
    )


def crop() -> Shift:
    """The upper row and the left column of patches are cut off, and the rest moves there."""

    def change(pixels: Tensor, first: int, patch: tuple[int, int]) -> Tensor:
        (h, w), (height, width) = patch, pixels.shape[-2:]
        check(height > h and width > w, 'crop', (height, width), f'more than a patch, {h}x{w}')
        return F.pad(pixels[..., h:, w:], (0, w, 0, h), mode='replicate')

    return Shift('crop', change, lambda before, after: (before[:, 1:, 1:], after[:, :-1, :-1]))


def noise(std: float) -> Shift:
    """Normal noise on every pixel; the weakest of ImageNet-C has a deviation of 0.08."""

    def change(pixels: Tensor, first: int, patch: tuple[int, int]) -> Tensor:
        # each its own, whatever batch it is in
        own = [torch.Generator().manual_seed(first + i) for i in range(len(pixels))]
        drawn = [torch.randn(pixels.shape[1:], generator=generator) for generator in own]
        return (pixels + std * torch.stack(drawn)).clamp(0, 1)

    return Shift(f'noise {std}', change)


class ShiftTally:
    """Counts changed experts over any number of images."""

    def __init__(
        self, model: Transformer, normalization: Normalization, shifts: Sequence[Shift]
    ) -> None:
        self._model, self._normalization, self._shifts = model, normalization, shifts
        self._changed: dict[str, dict[str, float]] = {shift.name: {} for shift in shifts}
        self._images = 0

    def add(self, images: Tensor) -> None:
        """Take further images."""
        if not self._shifts or not len(images):
            return
        patch = self._model.patch_embed.patch_size
        pixels = _in_256_steps(_whole_patches(self._normalization.pixels(images), patch))
        before = self._first_experts(pixels)
        for shift in self._shifts:
            after = self._first_experts(_in_256_steps(shift.change(pixels, self._images, patch)))
            changed = self._changed[shift.name]
            for name, experts in before.items():
                share = changed_share(*shift.align(experts, after[name]))
                changed[name] = changed.get(name, 0.0) + share * len(images)
        self._images += len(images)

    def shares(self) -> dict[str, dict[str, float]]:
        """By shift and decider: the share of patches whose expert changes, all images alike."""
        return {
            shift: {name: total / self._images for name, total in changed.items()}
            for shift, changed in self._changed.items()
        }

    def _first_experts(self, pixels: Tensor) -> dict[str, Tensor]:
        images = self._normalization.normalized(pixels)
        found = decided(self._model, images)
        return {name: on_patches(self._model, images, e[..., 0]) for name, e in found.items()}


def in_colour(pixels: Tensor) -> Tensor:
    """Pixels (B, C, H, W) of one or three channels as (B, 3, H, W)."""
    channels = pixels.shape[1]
    check(channels in (1, 3), 'channels', channels, '1 or 3, or nobody can look at them')
    return pixels.expand(-1, 3, -1, -1)


def _whole_patches(pixels: Tensor, patch: tuple[int, int]) -> Tensor:
    (h, w), (height, width) = patch, pixels.shape[-2:]
    check(height >= h and width >= w, 'images', (height, width), f'at least a patch, {h}x{w}')
    return pixels[..., : height // h * h, : width // w * w]


def _in_256_steps(pixels: Tensor) -> Tensor:
    """As image files hold them, so that to be written there is no change by itself."""
    return (pixels * 255).round() / 255
