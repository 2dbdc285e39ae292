"""Between images as a model is given them and images as people look at them.

Legend: B images of C channels, H height, W width.
"""

from torch import Tensor

from vqmoe_vision.models.normalization import Normalization
from vqmoe_vision.moe.config import check

__all__ = ['Normalization', 'in_colour']


def in_colour(pixels: Tensor) -> Tensor:
    """Pixels (B, C, H, W) of one or three channels as (B, 3, H, W).

    Raises:
        ValueError: If there is another number of channels.
    """
    channels = pixels.shape[1]
    check(channels in (1, 3), 'channels', channels, '1 or 3, or nobody can look at them')
    return pixels.expand(-1, 3, -1, -1)
