"""Image transforms by name, for configs."""

from collections.abc import Sequence

from mmengine.registry import TRANSFORMS
from timm.data import create_transform
from torchvision import transforms

# timm's own recipe: `type='timm'`, then the keyword arguments of timm.data.create_transform.
TRANSFORMS.register_module(name='timm', module=create_transform)


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
