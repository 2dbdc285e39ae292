"""Scenes composed of scanned digits: real strokes, with labels that are exact by construction."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np

from vqmoe_vision.engine.digits import digit_scans

# Sides of a pasted scan in pixels. A classifier that saw scans enlarged to 48x48 knows this scale.
_SIDES = (40, 48)
_DIGITS = (3, 6)  # per scene, the upper end excluded
_ATTEMPTS = 20


@dataclass(frozen=True)
class DigitScene:
    """A scene."""

    image: np.ndarray  # (H, W, 3) uint8, BGR
    labels: np.ndarray  # (H, W) uint8: 0 for background, d + 1 for the strokes of digit d


def digit_scene_maker(split: str, size: int, seed: int) -> Callable[[int], DigitScene]:
    """A function from an index to a scene, always the same for the same arguments."""
    scans, digits = digit_scans(split)
    if size < _SIDES[1]:
        raise ValueError(f'size={size} must be at least {_SIDES[1]}, the side of a large digit')
    own = ('train', 'test', 'dev').index(split)
    # a partial and not a lambda: workers that are spawned get their data set pickled
    return partial(_compose, scans=scans, digits=digits, size=size, seeds=(seed, own))


def _compose(
    index: int, scans: np.ndarray, digits: np.ndarray, size: int, seeds: tuple[int, int]
) -> DigitScene:
    rng = np.random.default_rng([*seeds, index])
    image = _background(rng, size)
    labels = np.zeros((size, size), np.uint8)
    taken = np.zeros((size, size), bool)
    for chosen in rng.integers(len(scans), size=rng.integers(*_DIGITS)):
        side = int(rng.integers(_SIDES[0], _SIDES[1] + 1))
        place = _free_place(rng, taken, side)
        if place is None:
            continue
        taken[place] = True
        scan = cv2.resize(scans[chosen], (side, side), interpolation=cv2.INTER_CUBIC)
        ink = scan.astype(np.float32)[..., None] / 255
        colour = rng.uniform(150, 255, 3).astype(np.float32)
        image[place] = image[place] * (1 - ink) + colour * ink
        labels[place][scan >= 96] = digits[chosen] + 1
    image += rng.normal(0, 4, image.shape)
    return DigitScene(np.clip(image, 0, 255).round().astype(np.uint8), labels)


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """Smooth dark colours, (size, size, 3) float32 in 0..100."""
    coarse = rng.uniform(0, 100, (3, 3, 3)).astype(np.float32)
    return cv2.resize(coarse, (size, size), interpolation=cv2.INTER_LINEAR)


def _free_place(
    rng: np.random.Generator, taken: np.ndarray, side: int
) -> tuple[slice, slice] | None:
    """A square where nothing is yet, None if a number of attempts found none."""
    for _ in range(_ATTEMPTS):
        top, left = rng.integers(0, len(taken) - side + 1, 2)
        place = slice(top, top + side), slice(left, left + side)
        if not taken[place].any():
            return place
    return None
