"""How images are normalised for a model: by what its weights were trained with.

Legend: B images of C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..moe.config import check

# Name of the buffer in a run's state dict.
KEY = 'normalization'
# Half a level of 8 bits: numbers that differ by less are one number, rounded differently.
_ROUNDING = 0.5 / 255


@dataclass(frozen=True)
class Normalization:
    """How images were normalised for a model: (pixels - mean) / std.

    Args:
        mean: Per channel, of pixels in [0, 1].
        std: Per channel, of pixels in [0, 1].
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, values: Mapping[str, Any], scale: float = 1.0, channels: int = 3) -> Normalization:
        """That of a configuration, such as timm's `pretrained_cfg`.

        Args:
            values: Has 'mean' and 'std', a number per channel, or one for all.
            scale: The value of a white pixel.
            channels: Of the images.

        Raises:
            ValueError: There is another number of numbers.
        """
        allowed = f'one number, or one for each channel of {channels}'
        for name in ('mean', 'std'):
            check(len(values[name]) in (1, channels), name, values[name], allowed)
        mean, std = (
            tuple(float(number) / scale for number in numbers * (channels // len(numbers)))
            for numbers in (list(values['mean']), list(values['std']))
        )
        return cls(mean, std)

    def values(self) -> Tensor:
        """(2, 3) float32: mean and standard deviation."""
        return torch.tensor([self.mean, self.std])

    def differing(self, other: Normalization) -> tuple[str, ...]:
        """Which of 'mean' and 'std' differ by more than the rounding of 8 bits."""
        return tuple(
            name for name in ('mean', 'std') if _differ(getattr(self, name), getattr(other, name))
        )

    def pixels(self, images: Tensor) -> Tensor:
        """Images as they were before: (B, C, H, W) in [0, 1], on the CPU.

        Raises:
            ValueError: If the images have another number of channels.
        """
        channels = images.shape[1]
        check(len(self.mean) == channels, 'mean', self.mean, f'a number per channel, {channels}')
        check(len(self.std) == channels, 'std', self.std, f'a number per channel, {channels}')
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (images.detach().float().cpu() * std + mean).clamp(0, 1)

    def normalized(self, pixels: Tensor) -> Tensor:
        """Images as the model is given them, of pixels (B, C, H, W) in [0, 1]."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (pixels - mean) / std


def _differ(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    return any(abs(a - b) > _ROUNDING for a, b in zip(ours, theirs, strict=True))


def of_buffer(values: Any) -> Normalization | None:
    """What the buffer of a run's model says.

    Args:
        values: (2, 3), mean and standard deviation of pixels in [0, 1].

    Returns:
        None if it says nothing yet, or is no such buffer.
    """
    if not isinstance(values, Tensor) or values.shape != (2, 3):
        return None
    mean, std = (tuple(row) for row in values.tolist())
    return Normalization(mean, std) if all(std) else None
