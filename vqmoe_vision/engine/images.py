"""Image files and digits as every task reads them, and which part of them a data set has.

`stored` pixels stand in the file, `displayed` are turned as EXIF says; whoever drew a label map saw
one of both. Legend: H, W height and width, N scans.
"""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from os import PathLike
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image

from vqmoe_vision.moe.config import check

IMAGE_SUFFIXES = frozenset({'.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp'})


def list_images(place: str | Path) -> list[Path]:
    """An image file, or those of a folder by name."""
    if Path(place).is_file():
        return [Path(place)]
    check(Path(place).is_dir(), 'images', str(place), 'a file or a folder')
    files = (path for path in Path(place).iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if images := sorted(filter(Path.is_file, files)):  # a pipe would be waited for
        return images
    raise ValueError(f'{place} holds no image ({", ".join(sorted(IMAGE_SUFFIXES))})')


@contextmanager
def opened(source: str | PathLike | IO[bytes], name: str) -> Iterator[Image.Image]:
    """Opens an image file; its pixels are not read before they are asked for."""
    try:
        with Image.open(source) as image:
            yield image
    except Image.DecompressionBombError as error:
        raise ValueError(
            f'{name} is too large to be opened unasked: {error} '
            '(twice PIL.Image.MAX_IMAGE_PIXELS, which may be raised)'
        ) from error
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        if type(error) is ValueError and name in str(error):
            raise  # says already what is wrong with the file
        raise ValueError(f'{name} cannot be read as an image: {error}') from error


def orientation(image: Image.Image) -> int:
    """EXIF orientation, 1..8; 1 is upright, and what a file without a valid one has."""
    value = image.getexif().get(ExifTags.Base.Orientation, 1)
    return value if value in range(1, 9) else 1


def displayed(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turns stored pixels (H, W, ...) as they are meant to be seen."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return pixels[::rows, ::columns]


def stored(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turns displayed pixels back; the inverse of `displayed`."""
    # quarter turns undo each other, all others themselves
    return displayed(pixels, {6: 8, 8: 6}.get(orientation, orientation))


def read_rgb(image: Image.Image, name: str) -> Image.Image:
    """Reads the pixels of an opened image, as they are displayed."""
    image.load()  # of a TIFF that turns the pixels; of a PNG what EXIF says may come after them
    # Pillow's exif_transpose writes all tags anew, and fails on a tag that is of another type
    turn = orientation(image)
    mode = image.mode
    # a 16-bit file that is no TIFF has mode I in some versions of Pillow
    if mode == 'I' and image.format == 'TIFF':
        raise ValueError(f'{name} has integers of 32 bits; images have 8 or 16, or floats of 0..1')
    if mode.startswith('I'):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif mode == 'F':
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):
            raise ValueError(
                f'{name} has floats of {values.min()}..{values.max()}; they must lie in 0..1'
            )
        image = Image.fromarray((values * 255).round().astype(np.uint8))
    rgb = image.convert('RGB')
    return rgb if turn == 1 else Image.fromarray(displayed(np.asarray(rgb), turn))


SPLITS = ('train', 'dev', 'test')
DIGITS = tuple(str(digit) for digit in range(10))


def digit_scans(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Scans (N, 8, 8) uint8, bright on black, and digits (N,); every digit in proportion."""
    if split not in SPLITS:
        raise ValueError(f'split={split!r} must be one of {SPLITS}')
    scans, targets, parts = _all_digits()
    return scans[parts[split]], targets[parts[split]]


@cache
def _all_digits() -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Scans, digits and the indices of each split, read once for all data sets of a run."""
    # here, because every tool reads this file, few the scans: a second of the eight to its start
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    def parted(indices: np.ndarray, size: int) -> list[np.ndarray]:
        return train_test_split(indices, test_size=size, stratify=targets[indices], random_state=0)

    images, targets = load_digits(return_X_y=True)
    rest, test = parted(np.arange(len(targets)), 360)
    train, dev = parted(rest, 180)
    scans = np.round(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return scans, targets, {'train': train, 'dev': dev, 'test': test}


# Sides of a pasted scan in pixels. A classifier that saw scans enlarged to 48x48 knows this scale.
SCENE_SIDES = (40, 48)


def digit_scene(
    scans: np.ndarray, digits: np.ndarray, size: int, seeds: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Image (H, W, 3) uint8 BGR, and labels (H, W) uint8: 0, and d + 1 for strokes of d."""
    import cv2  # here for the reason of `_all_digits`

    rng = np.random.default_rng(seeds)
    coarse = rng.uniform(0, 100, (3, 3, 3)).astype(np.float32)  # smooth dark colours
    image: Any = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_LINEAR)
    labels, taken = np.zeros((size, size), np.uint8), np.zeros((size, size), bool)
    for chosen in rng.integers(len(scans), size=rng.integers(3, 6)):
        side = int(rng.integers(SCENE_SIDES[0], SCENE_SIDES[1] + 1))
        for _ in range(20):  # attempts to find a square where nothing is yet
            top, left = rng.integers(0, size - side + 1, 2)
            place = slice(top, top + side), slice(left, left + side)
            if not taken[place].any():
                break
        else:
            continue
        taken[place] = True
        scan = cv2.resize(scans[chosen], (side, side), interpolation=cv2.INTER_CUBIC)
        ink = scan.astype(np.float32)[..., None] / 255
        colour = rng.uniform(150, 255, 3).astype(np.float32)
        image[place] = image[place] * (1 - ink) + colour * ink
        labels[place][scan >= 96] = digits[chosen] + 1
    image += rng.normal(0, 4, image.shape)
    return np.clip(image, 0, 255).round().astype(np.uint8), labels


class TrainingPart(NamedTuple):
    """A part of training images; a data set has it as `training_part`."""

    source: tuple[str, ...]
    name: str
    dev_size: int
