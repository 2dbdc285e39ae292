"""Image transforms by name, for configs."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from mmengine.registry import TRANSFORMS
from PIL import Image
from timm.data import DEFAULT_CROP_PCT, create_transform
from timm.layers import to_2tuple
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional

from vqmoe_vision.engine.model import must_change
from vqmoe_vision.models.normalization import Normalization, stated_normalization
from vqmoe_vision.moe.config import check

Numbers = Sequence[float]
# Options of a test that `pretrained_cfg` of timm can say, and those that it needs not.
_SAID = frozenset(
    {
        'type', 'input_size', 'crop_pct', 'crop_mode', 'interpolation', 'mean', 'std',
        'from_scratch', 'is_training',
    }
)  # fmt: skip
_PER_CHANNEL = 'a number from 0 to 1, or one for each of 3 channels, or from_scratch with them'


@TRANSFORMS.register_module(name='timm')
def timm_transform(
    shift: str | None = None, from_scratch: dict[str, Numbers] | None = None, **kwargs: Any
) -> Callable:
    """The recipe of timm.

    Args:
        shift: Corruption of a test, such as 'gaussian_noise_3'; needs the extra `analyze`.
        from_scratch: `dict(mean=..., std=...)`, which stands for what is left out where a training
            starts from no weights, or from weights of which it is not known.
        **kwargs: Of `timm.data.create_transform`; `mean` and `std` may be None.

    Raises:
        ValueError: There is no such corruption, or no images can be normalised so.
    """
    kwargs |= _numbers(from_scratch, kwargs.pop('mean', None), kwargs.pop('std', None))
    transform = create_transform(**kwargs)
    if shift is None:
        return transform
    # numba and scikit-image come with it: only those who ask for it wait for them
    from vqmoe_vision.analysis.shifts import Corruption

    corrupt = Corruption(shift)
    first = transforms.Lambda(lambda image: Image.fromarray(corrupt(np.asarray(image))))
    return transforms.Compose([first, *transform.transforms])


@TRANSFORMS.register_module(name='crop_flip')
def crop_flip(
    input_size: int,
    mean: Numbers | None = None,
    std: Numbers | None = None,
    padding: int = 4,
    hflip: float = 0.5,
    from_scratch: dict[str, Numbers] | None = None,
) -> transforms.Compose:
    """Pads, crops at random and flips at random, the light augmentation of small images.

    Args:
        input_size: Height and width of the result, in pixels.
        mean: Subtracted from each channel; channels are in [0, 1]. None for that of the weights.
        std: Divides each channel. None for that of the weights, as for `mean`.
        padding: Black pixels added on each side before the crop.
        hflip: Probability of a horizontal flip.
        from_scratch: As in `timm_transform`.

    Raises:
        ValueError: Neither says how to normalise, or one of both alone, or not with a number from 0
            to 1 for each channel.
    """
    numbers = _numbers(from_scratch, mean, std)
    check(bool(numbers), 'transform.mean', None, _PER_CHANNEL)
    return transforms.Compose(
        [
            transforms.Resize(input_size),
            transforms.RandomCrop(input_size, padding),
            transforms.RandomHorizontalFlip(hflip),
            NormalizedTensor(**numbers),
        ]
    )


def _numbers(
    from_scratch: dict[str, Numbers] | None, mean: Numbers | None, std: Numbers | None
) -> dict[str, Numbers]:
    """What a transform normalises with at first; empty where nobody says it."""
    own = {'mean': mean, 'std': std}
    for field, pair in (('transform', own), ('transform.from_scratch', from_scratch or {})):
        stated = {name: value for name, value in pair.items() if value is not None}
        for name, value in stated.items():
            listed = isinstance(value, list | tuple) and len(value) in (1, 3)
            check(listed, f'{field}.{name}', value, _PER_CHANNEL)
        if stated_normalization(stated, f'{field}.') is not None:
            return {name: tuple(value) * (3 // len(value)) for name, value in stated.items()}
    return {}


class NormalizedTensor(transforms.Normalize):
    """torchvision's `ToTensor` and `Normalize` to the bit, by a table of what each byte becomes."""

    def __init__(self, mean: Numbers, std: Numbers) -> None:
        super().__init__(mean, std)
        every = torch.arange(256, dtype=torch.uint8).repeat(len(mean), 1, 1)
        levels = functional.normalize(every.float().div(255), list(mean), list(std))
        self._table = levels[:, 0].numpy()

    def forward(self, image: Image.Image) -> Tensor:
        """An RGB image of H x W pixels as a float32 tensor (3, H, W)."""
        pairs = zip(self._table, np.asarray(image).transpose(2, 0, 1), strict=True)
        return torch.from_numpy(np.stack([table[channel] for table, channel in pairs]))


def normalization_of(transform: Any) -> Normalization | None:
    """How a transform normalises images; None if no step is a `Normalize` of torchvision."""
    for step in reversed(getattr(transform, 'transforms', [])):
        if isinstance(step, transforms.Normalize):
            values = (torch.as_tensor(value).flatten().tolist() for value in (step.mean, step.std))
            return Normalization(*map(tuple, values))
    return None


def normalized_as(
    config: dict, weights: Normalization | None, field: str, owner: str = 'the weights'
) -> Callable:
    """A transform that normalises images as the weights want it."""
    transform = TRANSFORMS.build(config)
    found = normalization_of(transform)
    if weights is None or found is None:
        return transform
    # of the transforms above, which normalise with `mean` and `std` if these are given
    follows = config.get('type') in ('timm', 'crop_flip')
    free = {k: v for k, v in vars(weights).items() if follows and config.get(k) is None}
    changes = must_change(found, weights, vars(weights).keys() - free, field, owner=owner)
    return TRANSFORMS.build({**config, **free}) if changes else transform


def preprocessing_of(config: Mapping, field: str) -> dict:
    """What the transform of a test does beside normalising, as timm's `pretrained_cfg` says it."""
    check(config.get('type') == 'timm', f'{field}.type', config.get('type'), "'timm'")
    given = {name: value for name, value in config.items() if value is not None}
    for name, value in given.items():
        check(name in _SAID, f'{field}.{name}', value, f'left out, or of {sorted(_SAID)}')
    check(not given.get('is_training'), f'{field}.is_training', True, 'False in a test')
    defaults = {k: p.default for k, p in inspect.signature(create_transform).parameters.items()}
    said = {**defaults, 'crop_mode': 'center', **given}
    size = said['input_size']
    return {
        'input_size': (3, *to_2tuple(size if isinstance(size, int) else tuple(size)[-2:])),
        'crop_pct': said['crop_pct'] or DEFAULT_CROP_PCT,
        'crop_mode': said['crop_mode'],
        'interpolation': said['interpolation'],
    }
