"""How a segmentor sees the images of a test: whole, or through windows that slide over them."""

from collections.abc import Mapping
from numbers import Integral
from typing import Any

from vqmoe_vision.engine.class_arguments import check_arguments
from vqmoe_vision.moe.config import check

_FIELD = 'model.test_cfg'
_SIDES = ('crop_size', 'stride')


def check_test_cfg(config: Mapping[str, Any]) -> None:
    """Refuses what mmseg would fail on in the first validation, or ignore."""
    check_arguments(_FIELD, config, ('mode', *_SIDES))
    mode = config.get('mode')
    allowed = "'whole', or 'slide' with crop_size and stride"
    check(mode in ('whole', 'slide'), f'{_FIELD}.mode', mode, allowed)
    if mode == 'whole':
        return
    for name in _SIDES:
        sides = config.get(name)
        allowed = f"two whole numbers, height and width, in mode 'slide', such as {name}=(512, 512)"
        check(_is_size(sides), f'{_FIELD}.{name}', sides, allowed)
    crop, stride = (config[name] for name in _SIDES)
    fits = all(step <= side for step, side in zip(stride, crop, strict=True))
    allowed = f'at most crop_size={crop!r}, or pixels between windows would have no prediction'
    check(fits, f'{_FIELD}.stride', stride, allowed)


def _is_size(sides: Any) -> bool:
    pair = isinstance(sides, tuple | list) and len(sides) == 2
    return pair and all(isinstance(side, Integral) and int(side) > 0 for side in sides)
