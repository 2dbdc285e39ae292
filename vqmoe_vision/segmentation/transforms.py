"""Images and label maps as they are read from files and augmented; errors name the file."""

import inspect
import io
import math
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cv2
import mmcv
import numpy as np
import torch
from mmcv.transforms import BaseTransform, LoadImageFromFile
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
# What a pipeline without files, such as that of an image at hand, leaves out.
LOADING_LABELS = frozenset({'LoadAnnotations', 'LoadLabels'})
LOADING_IMAGES = frozenset({'LoadImageFromFile', 'LoadImage'})
LOADING = LOADING_LABELS | LOADING_IMAGES
# What decoders raise for a damaged file.
UNREADABLE = (OSError, ValueError, AttributeError, SyntaxError, struct.error, cv2.error)


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
        check(not self.ignore_empty, 'ignore_empty', True, 'False, as no image is left out unasked')

    def transform(self, results: dict) -> dict:
        """Loads `img_path`, and seeds what augments it as the index of the sample says."""
        seed_sample(results.get('sample_idx', 0))
        return results | self.entries(self.read(results['img_path'], results.get('seg_map_path')))

    def entries(self, pixels: np.ndarray) -> dict:
        """What the steps that follow in a pipeline want of an image."""
        image, shape = pixels.astype(np.float32) if self.to_float32 else pixels, pixels.shape[:2]
        return {'img': image, 'img_shape': shape, 'ori_shape': shape}

    def shifted(self, pixels: np.ndarray) -> np.ndarray:
        """An image (H, W, 3) uint8 BGR as the corruption leaves it, if there is one."""
        if self.corrupt is None:
            return pixels
        return np.ascontiguousarray(self.corrupt(pixels[..., ::-1])[..., ::-1])

    def read(self, path: str, label_path: str | None = None) -> np.ndarray:
        """Reads an image (H, W, 3) uint8 BGR; its label map decides which way it is turned."""
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
            turn = _turned(labels)  # which is gone once the pixels are read
            return stored(np.asarray(labels), turn).shape[:2]


def _turned(image: Any) -> int:
    """What decoders turn the pixels by unasked: that of a TIFF."""
    return orientation(image) if image.format == 'TIFF' else 1


def image_loader(dataset: dict, **defaults: Any) -> LoadImage:
    """What reads the images of a data set, with the options that its pipeline gives."""
    options = [
        {name: value for name, value in step.items() if name != 'type'}
        for inner in innermost(dataset)
        for step in inner.get('pipeline') or ()
        if step['type'] in LOADING_IMAGES
    ]
    first = options[0] if options else {}
    alike = all(other == first for other in options)
    check(alike, 'dataset.type', dataset['type'], 'data sets that read images with equal options')
    return LoadImage(**{**defaults, **first})


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

    def transform(self, results: dict) -> dict:
        """Loads `seg_map_path` into `gt_seg_map` (H, W)."""
        path = results.get('seg_map_path')
        if path is None:
            raise ValueError(
                f'{results["img_path"]} has no label map: name their folder in '
                'data_prefix.seg_map_path, or leave LoadAnnotations out of the pipeline'
            )
        num_classes = results.get('num_classes', own := self.num_classes)
        allowed = f'left out, the data set has {num_classes} classes'
        check(own in (None, num_classes), 'LoadAnnotations.num_classes', own, allowed)
        try:
            with opened(io.BytesIO(fileio.get(path, backend_args=self.backend_args)), path) as file:
                turn, shape, bands = _turned(file), file.size[::-1], len(file.getbands())
                # all other modes have 8 bits or fewer
                wide = np.asarray(file) if file.mode.startswith(('I', 'F')) else np.empty(0)
            results = super().transform(results)
        except UNREADABLE as error:
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


@TRANSFORMS.register_module()
class Albumentations(BaseTransform):
    """Runs albumentations on an image and its label map.

    Images are handed over as RGB and come back as BGR. Pixels that a geometric transform brings in
    from outside, and objects that `MaskDropout` takes out, are ignored in the label map
    (`fill_mask=255`), where albumentations would call them class 0. Other dropouts keep the labels
    under their holes. Random numbers come from torch's generator, which differs between workers
    and is set by the run's seed; albumentations' own would be the same in every worker.

    Args:
        transforms: Each a `type` from albumentations and its arguments; `transforms` in one of
            them, such as `OneOf`, is a list of the same kind.

    Raises:
        ValueError: albumentations does not know a type, would ignore an argument, or gives class 0
            to pixels from outside whatever it is told.
    """

    def __init__(self, transforms: list[dict]) -> None:
        # or its import asks pypi.org for a newer version
        os.environ.setdefault('NO_ALBUMENTATIONS_UPDATE', '1')
        import albumentations

        self.compose = albumentations.Compose([_build(config) for config in transforms])

    def transform(self, results: dict) -> dict:
        """Changes `img` (H, W, 3), `gt_seg_map` (H, W) where there is one, and the sizes."""
        kind = str(results['img'].dtype)
        check(kind == 'uint8', "results['img'].dtype", kind, 'uint8, without to_float32=True')
        self.compose.set_random_seed(int(torch.randint(2**31, ())))
        inputs = {'image': mmcv.bgr2rgb(results['img'])}
        if 'gt_seg_map' in results:
            inputs['mask'] = results['gt_seg_map']
        outputs = self.compose(**inputs)
        results['img'] = mmcv.rgb2bgr(outputs['image'])
        if 'gt_seg_map' in results:
            results['gt_seg_map'] = outputs['mask']
        results['img_shape'] = results['pad_shape'] = results['img'].shape[:2]
        return results


def _build(config: dict) -> Any:
    import albumentations

    arguments = dict(config)
    name = arguments.pop('type')
    kind = getattr(albumentations, name, None)
    if kind is None:
        raise ValueError(f'type={name!r} is not in albumentations {albumentations.__version__}')
    # its pixels from outside have class 0, whatever it is told
    check(name != 'GridElasticDeform', 'type', name, 'another, such as ElasticTransform')
    known = inspect.signature(kind).parameters
    for argument in arguments:
        if argument not in known:
            raise ValueError(f'{name}.{argument} is not possible; it has {", ".join(known)}')
    # None keeps the labels under the holes of a dropout; all else would fill with class 0
    if 'fill_mask' in known and known['fill_mask'].default is not None:
        arguments.setdefault('fill_mask', IGNORE)
    if 'transforms' in arguments:
        arguments['transforms'] = [_build(inner) for inner in arguments['transforms']]
    transform = kind(**arguments)
    if 'fill_mask' not in known and getattr(transform, 'fill_mask', None) is not None:
        transform.fill_mask = None  # of a dropout that gives nobody the choice
    return transform
