"""Images and label maps as they are read from files, with errors that name the file."""

import io
import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cv2
import mmcv
import numpy as np
from mmcv.transforms import LoadImageFromFile
from mmengine import fileio
from mmseg.datasets.transforms import LoadAnnotations
from mmseg.registry import TRANSFORMS
from PIL.JpegImagePlugin import JpegImageFile

from vqmoe_vision.engine.config import innermost
from vqmoe_vision.engine.images import displayed, opened, orientation, read_rgb, stored
from vqmoe_vision.engine.seeding import seed_sample
from vqmoe_vision.moe.config import check

IGNORE = 255
# Of files that are taken for images, in capitals too.
IMAGE_SUFFIXES = frozenset({'.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp'})
# What a pipeline without files, such as that of an image at hand, leaves out.
LOADING_LABELS = frozenset({'LoadAnnotations', 'LoadLabels'})
LOADING_IMAGES = frozenset({'LoadImageFromFile', 'LoadImage'})
LOADING = LOADING_LABELS | LOADING_IMAGES
# What decoders raise for a damaged file.
_UNREADABLE = (OSError, ValueError, AttributeError, SyntaxError, struct.error, cv2.error)


@contextmanager
def named(name: str) -> Iterator[None]:
    """Names the image that a step of a pipeline cannot take."""
    try:
        yield
    except cv2.error as error:
        said = ' '.join(str(error).split())
        raise ValueError(f'{name} is nothing that the pipeline can change: {said}') from error


@TRANSFORMS.register_module()
class LoadImage(LoadImageFromFile):
    """mmcv's `LoadImageFromFile`, always three channels, with an error that names the file.

    An image is turned as its label map was drawn, if EXIF says how to show it: as it is stored
    where that fits the label map's size, else as it is displayed; displayed without a label map.
    `imdecode_backend` decodes JPEG, of which decoders differ; the rest is read as in
    classification. Other values of `color_type` than 'color', and the backend 'tifffile', are
    mmcv's alone.

    Args:
        shift: Corruption of a test, such as 'gaussian_noise_3'; needs the extra `analyze`.
        **kwargs: As `LoadImageFromFile`.
    """

    def __init__(self, shift: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.corrupt = None
        if shift is not None:
            # numba and scikit-image come with it: only those who ask for it wait for them
            from vqmoe_vision.analysis.shifts import Corruption

            self.corrupt = Corruption(shift)
        args = self.file_client_args
        check(args is None, 'file_client_args', args, "backend_args, mmcv's newer name for it")

    def transform(self, results: dict[str, Any]) -> dict[str, Any] | None:
        """Loads `img_path`, and seeds what augments it as the index of the sample says."""
        seed_sample(results.get('sample_idx', 0))
        try:
            pixels = self.read(results['img_path'], results.get('seg_map_path'))
        except ValueError:
            if self.ignore_empty:
                return None
            raise
        return {**results, **self.entries(pixels)}

    def entries(self, pixels: np.ndarray) -> dict[str, Any]:
        """What the steps that follow in a pipeline want of an image."""
        shape = pixels.shape[:2]
        image = pixels.astype(np.float32) if self.to_float32 else pixels
        return {'img': image, 'img_shape': shape, 'ori_shape': shape}

    def shifted(self, pixels: np.ndarray) -> np.ndarray:
        """An image (H, W, 3) uint8 BGR as the corruption leaves it, if there is one."""
        rgb = pixels[..., ::-1]
        return (
            pixels if self.corrupt is None else np.ascontiguousarray(self.corrupt(rgb)[..., ::-1])
        )

    def read(self, path: str, label_path: str | None = None) -> np.ndarray:
        """Reads an image, and corrupts it if that is asked for.

        Args:
            path: The image.
            label_path: Its label map, which decides which way it is turned.

        Returns:
            (H, W, 3) uint8, BGR; of another `color_type` or the backend 'tifffile' as mmcv has it.

        Raises:
            ValueError: The file cannot be read as an image, or is too large.
        """
        return self.shifted(self._decoded(path, label_path))

    def _decoded(self, path: str, label_path: str | None) -> np.ndarray:
        try:
            content = fileio.get(path, backend_args=self.backend_args)
            if self.imdecode_backend == 'tifffile':
                return self._decode(content, self.color_type)
            with opened(io.BytesIO(content), str(path)) as image:
                if self.color_type != 'color':
                    return self._decode(content, self.color_type)
                turn = orientation(image)
                if isinstance(image, JpegImageFile):
                    turns = self.imdecode_backend != 'turbojpeg'
                    pixels = self._decode(content, 'color_ignore_orientation' if turns else 'color')
                else:
                    pixels = stored(np.asarray(read_rgb(image, str(path)))[..., ::-1], turn)
        except (OSError, AttributeError, AssertionError, cv2.error) as error:
            raise ValueError(f'{path} cannot be read as an image') from error
        if turn > 1 and self._label_shape(label_path) != pixels.shape[:2]:
            pixels = displayed(pixels, turn)
        return np.ascontiguousarray(pixels)

    def _decode(self, content: bytes, flag: str) -> np.ndarray:
        pixels = mmcv.imfrombytes(content, flag=flag, backend=self.imdecode_backend)
        assert pixels is not None, 'what mmcv gives for what it cannot decode'
        return pixels

    def _label_shape(self, path: str | None) -> tuple[int, ...] | None:
        if path is None or not fileio.exists(path, backend_args=self.backend_args):
            return None  # a test may have the place of label maps, but none
        with opened(io.BytesIO(fileio.get(path, backend_args=self.backend_args)), path) as labels:
            turn = _turned(labels)
            return stored(np.asarray(labels), turn).shape[:2]


def _turned(image: Any) -> int:
    """What decoders turn the pixels by unasked: that of a TIFF, which is gone once it is read."""
    return orientation(image) if image.format == 'TIFF' else 1


def image_loader(dataset: dict[str, Any], **defaults: Any) -> LoadImage:
    """What reads the images of a data set, with the options that its pipeline gives."""
    options = [
        {name: value for name, value in step.items() if name != 'type'}
        for step in [step for inner in innermost(dataset) for step in inner.get('pipeline') or ()]
        if step['type'] in LOADING_IMAGES
    ]
    if any(other != options[0] for other in options):
        raise ValueError(f'the data sets of {dataset["type"]} read images with different options')
    return LoadImage(**{**defaults, **(options[0] if options else {})})


def in_bgr(pixels: np.ndarray) -> np.ndarray:
    """The pixels (H, W) or (H, W, 3 or more) of a `LoadImage` as a picture (H, W, 3)."""
    return mmcv.gray2bgr(pixels) if pixels.ndim == 2 else pixels[..., :3]


@TRANSFORMS.register_module()
class LoadLabels(LoadAnnotations):
    """mmseg's `LoadAnnotations`, with checks that name the file.

    Args:
        num_classes: Number of classes; labels lie below it or are 255. None takes it from a
            `CheckedDataset`, and does not compare the labels of mmseg's own data sets.
        **kwargs: As `LoadAnnotations`.
    """

    def __init__(self, num_classes: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_classes = num_classes

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Loads `seg_map_path` into `gt_seg_map` (H, W)."""
        path = results.get('seg_map_path')
        if path is None:
            raise ValueError(
                f'{results["img_path"]} has no label map: name their folder in '
                'data_prefix.seg_map_path, or leave LoadAnnotations out of the pipeline'
            )
        own = self.num_classes
        num_classes = results.get('num_classes', own)
        allowed = f'left out, the data set has {num_classes} classes'
        check(own in (None, num_classes), 'LoadAnnotations.num_classes', own, allowed)
        try:
            with opened(io.BytesIO(fileio.get(path, backend_args=self.backend_args)), path) as file:
                turn, shape, bands = _turned(file), file.size[::-1], len(file.getbands())
                # all other modes have 8 bits or fewer
                wide = np.asarray(file) if file.mode.startswith(('I', 'F')) else np.empty(0)
            results = super().transform(results)
        except _UNREADABLE as error:
            raise ValueError(f'{path} cannot be read as a label map: {error}') from error
        labels, size = results['gt_seg_map'], results['ori_shape']
        if bands > 1 or labels.size != math.prod(shape):
            raise ValueError(f'{path} is a colour image; a label map has one class index per pixel')
        if labels.ndim < 2:  # mmseg's squeeze() has taken away a side of one pixel
            labels = labels.reshape(shape)
        results['gt_seg_map'] = labels = np.ascontiguousarray(stored(labels, turn))
        shift = int(bool(results['reduce_zero_label']))
        wrong = wide[wide != (wide.astype(np.int64) & 0xFF)]  # mmseg would make 256 class 0
        if num_classes is not None and not len(wrong):
            counts = np.bincount(labels.ravel(), minlength=IGNORE + 1)
            wrong = np.flatnonzero(counts[num_classes:IGNORE]) + num_classes + shift
        if len(wrong):
            # of the classes in the files, which may be more than a config chooses
            last = len(results.get('label_map') or ()) or num_classes or IGNORE
            raise ValueError(
                f'{path} holds the label {wrong[0]}; allowed are {shift}..{last - 1 + shift}, '
                f'and {0 if shift else IGNORE} for pixels to ignore'
            )
        if labels.shape != tuple(size):
            raise ValueError(
                f'{path} has {labels.shape[1]}x{labels.shape[0]} pixels, '
                f'{results["img_path"]} has {size[1]}x{size[0]}'
            )
        return results
