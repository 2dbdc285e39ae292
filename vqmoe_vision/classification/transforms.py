"""Image transforms by name, for configs."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from mmengine.registry import TRANSFORMS
from PIL import Image
from timm.data import create_transform
from torchvision import transforms


@TRANSFORMS.register_module(name='timm')
def timm_transform(shift: str | None = None, **kwargs: Any) -> Callable:
    """The recipe of timm.

    Args:
        shift: Corruption of a test, such as 'gaussian_noise_3'; needs the extra `analyze`.
        **kwargs: Of `timm.data.create_transform`.

    Raises:
        ValueError: There is no such corruption.
    """
    transform = create_transform(**kwargs)
    if shift is None:
        return transform
    # numba and scikit-image come with it: only those who ask for it wait for them
    from vqmoe_vision.analysis.corruptions import Corruption

    corrupt = Corruption(shift)
    first = transforms.Lambda(lambda image: Image.fromarray(corrupt(np.asarray(image))))
    return transforms.Compose([first, *transform.transforms])


@TRANSFORMS.register_module(name='crop_flip')
def crop_flip(
    input_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    padding: int = 4,
    hflip: float = 0.5,
) -> transforms.Compose:
    """Pads, crops at random and flips at random, the light augmentation of small images.

    Args:
        input_size: Height and width of the result, in pixels.
        mean: Subtracted from each channel; channels are in [0, 1].
        std: Divides each channel.
        padding: Black pixels added on each side before the crop.
        hflip: Probability of a horizontal flip.
    """
    steps = [
        transforms.Resize(input_size),
        transforms.RandomCrop(input_size, padding),
        transforms.RandomHorizontalFlip(hflip),
        transforms.ToTensor(),
        transforms.Normalize(mean, std),
    ]
    return transforms.Compose(steps)
