"""The fifteen common corruptions of ImageNet-C (Hendrycks and Dietterich, arXiv 1903.12261).

Needs imagecorruptions-imaug (extra `analyze`).
"""

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from imagecorruptions import corrupt, get_corruption_names
from torch import Tensor

from vqmoe_vision.moe.config import check

from .shifts import Shift, crop, flip, in_colour, noise

NOISE = 0.04  # half of the weakest of ImageNet-C
SMALLEST = 32  # pixels; the library refuses what is smaller
# these do not draw from NumPy's global generator, but take a seed
SEEDED = ('impulse_noise', 'glass_blur')


def corruptions(severities: Sequence[int] = (1, 3, 5)) -> list[Shift]:
    """Every common corruption at every severity."""
    return [corruption(name, s) for name in get_corruption_names('common') for s in severities]


def all_shifts(severities: Sequence[int] = (1, 3, 5)) -> list[Shift]:
    """Mirrored, moved by a patch, with noise that is hardly seen, and every corruption."""
    return [flip(), crop(), noise(NOISE), *corruptions(severities)]


def corruption(name: str, severity: int) -> Shift:
    """One corruption, drawn anew for each image, but always the same for the same image."""

    def change(pixels: Tensor, first: int, patch: tuple[int, int]) -> Tensor:
        bytes_ = (in_colour(pixels) * 255).round().byte().permute(0, 2, 3, 1).numpy()
        changed = [_corrupted(each, name, severity, first + i) for i, each in enumerate(bytes_)]
        colour = torch.from_numpy(np.stack(changed)).permute(0, 3, 1, 2).float() / 255
        # a corruption of grey may come out in colour
        return colour if pixels.shape[1] == 3 else colour.mean(dim=1, keepdim=True)

    return Shift(f'{name} {severity}', change)


class Corruption:
    """Corrupts images of a test, always alike for the same pixels."""

    def __init__(self, shift: str) -> None:
        self.name, _, severity = shift.rpartition('_')
        known = get_corruption_names('common')
        valid = self.name in known and severity in [*'12345']
        check(valid, 'shift', shift, f"such as 'fog_3', 1 to 5, of {', '.join(known)}")
        self.severity = int(severity)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8, RGB, of at least 32 pixels; returns the same."""
        return _corrupted(image, self.name, self.severity, zlib.crc32(image.tobytes()))


def _corrupted(image: np.ndarray, name: str, severity: int, number: int) -> np.ndarray:
    height, width = image.shape[:2]
    enough = min(height, width) >= SMALLEST
    allowed = f'at least {SMALLEST}x{SMALLEST} pixels; leave the corruptions out'
    check(enough, 'images', (height, width), allowed)
    # by name too, or every kind of noise would be drawn alike
    seed = (zlib.crc32(name.encode()) + number) % 2**32
    options = {'seed': seed} if name in SEEDED else {}
    with _numpy_seed(seed):
        image = np.ascontiguousarray(image)
        return corrupt(image, corruption_name=name, severity=severity, **options)


@contextmanager
def _numpy_seed(seed: int) -> Iterator[None]:
    """The library draws from NumPy's global generator, which is left as it was."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)
