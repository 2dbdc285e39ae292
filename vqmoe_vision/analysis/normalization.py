"""Between images as a model is given them and images as people look at them.

Legend: B images of C channels, H height, W width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vqmoe_vision.moe.config import check


@dataclass(frozen=True)
class Normalization:
    """How images were normalised for a model: (pixels - mean) / std.

    Args:
        mean: Per channel, of pixels in [0, 1].
        std: Per channel, of pixels in [0, 1].
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

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


def in_colour(pixels: Tensor) -> Tensor:
    """Pixels (B, C, H, W) of one or three channels as (B, 3, H, W).

    Raises:
        ValueError: If there is another number of channels.
    """
    channels = pixels.shape[1]
    check(channels in (1, 3), 'channels', channels, '1 or 3, or nobody can look at them')
    return pixels.expand(-1, 3, -1, -1)
