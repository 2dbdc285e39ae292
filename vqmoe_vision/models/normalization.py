"""How images are normalised for a model: by what its weights were trained with.

Legend: B images of C channels, H height, W width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
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
    def of(
        cls, values: Mapping, scale: float = 1.0, channels: int = 3, prefix: str = ''
    ) -> 'Normalization':
        """That of 'mean' and 'std', a number per channel or one for all; `scale` is white."""
        mean, std = (
            _per_channel(values[name], f'{prefix}{name}', scale, channels)
            for name in ('mean', 'std')
        )
        check(min(std) > 0, f'{prefix}std', values['std'], 'above 0')
        return cls(mean, std)

    def values(self) -> Tensor:
        """(2, C) float32: mean and standard deviation."""
        return torch.tensor([self.mean, self.std])

    def differing(self, other: 'Normalization') -> tuple[str, ...]:
        """Which of 'mean' and 'std' differ by more than the rounding of 8 bits."""
        return tuple(
            name
            for name in ('mean', 'std')
            if any(
                abs(a - b) > _ROUNDING
                for a, b in zip(getattr(self, name), getattr(other, name), strict=True)
            )
        )

    def pixels(self, images: Tensor) -> Tensor:
        """Images as they were before: (B, C, H, W) in [0, 1], on the CPU."""
        channels = images.shape[1]
        check(len(self.mean) == channels, 'mean', self.mean, f'a number per channel, {channels}')
        mean, std = self.values()[..., None, None]
        return (images.detach().float().cpu() * std + mean).clamp(0, 1)

    def normalized(self, pixels: Tensor) -> Tensor:
        """Images as the model is given them, of pixels (B, C, H, W) in [0, 1]."""
        mean, std = self.values()[..., None, None]
        return (pixels - mean) / std


def stated_normalization(
    config: Mapping, prefix: str, scale: float = 1.0, channels: int = 3
) -> Normalization | None:
    """What somebody states, who has to state both numbers: half of a pair has no other half."""
    given = [name for name in ('mean', 'std') if name in config]
    if not given:
        return None
    other = 'std' if given[0] == 'mean' else 'mean'
    check(len(given) == 2, f'{prefix}{given[0]}', config[given[0]], f'beside {prefix}{other}')
    return Normalization.of(config, scale, channels, prefix)


def check_normalization(config: Mapping, prefix: str) -> None:
    """Refuse a configuration of timm that no images can be prepared by."""
    size = config.get('input_size')
    valid = size is None or (isinstance(size, list | tuple) and len(size) == 3)
    check(valid, f'{prefix}input_size', size, '(channels, height, width)')
    stated_normalization(config, prefix, channels=size[0] if size else 3)


def _per_channel(value: Any, field: str, scale: float, channels: int) -> tuple[float, ...]:
    """A number for each channel, in parts of a white pixel."""
    numbers = list(value) if isinstance(value, list | tuple) else [value]
    real = all(isinstance(x, Real) and not isinstance(x, bool) for x in numbers)
    check(real and len(numbers) in (1, channels), field, value, f'one number, or {channels}')
    parts = [float(number) / scale for number in numbers]
    # the other way to write them, in levels of 255, is the likely mistake
    check(
        all(0 <= part <= 1 for part in parts), field, value, f'from 0 to {scale:g}, a white pixel'
    )
    # a whole level of 255 is less than any images have, unless they are black
    allowed = f'in levels of 0 to {scale:g}, as these would be of 0 to 1'
    check(scale <= 1 or not 0 < max(numbers) < 1, field, value, allowed)
    return tuple(parts * (channels // len(parts)))


def of_buffer(values: Any) -> Normalization | None:
    """What the buffer of a run's model says."""
    if not isinstance(values, Tensor) or values.shape != (2, 3):
        return None
    # NumPy writes 0.485 of a float32 that is 0.48500001430511475: the fewest digits that say it
    mean, std = (tuple(float(str(x)) for x in row) for row in values.float().cpu().numpy())
    return Normalization(mean, std) if all(std) else None
