"""Predictions for images that need no data set: a file, a folder, or an array."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import mmcv
import numpy as np
import torch
from mmcv.transforms import Compose
from mmengine.registry import init_default_scope
from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS

from vqmoe_vision.engine.checkpoint import read_content
from vqmoe_vision.engine.cli import load_config
from vqmoe_vision.engine.config import innermost
from vqmoe_vision.engine.hooks import check_class_names
from vqmoe_vision.engine.trained import load_trained
from vqmoe_vision.moe.config import check

from .datasets import complete_metainfo
from .loading import IMAGE_SUFFIXES, LOADING, LoadImage, image_loader, in_bgr


@dataclass(frozen=True)
class Prediction:
    """What a model says about an image.

    Args:
        name: Stem of the file, or `image_<index>` for an array.
        labels: (H, W) uint8 class indices.
        overlay: (H, W, 3) uint8, BGR: the image under half transparent colours of the classes.
        classes: Names of the classes by index.
    """

    name: str
    labels: np.ndarray
    overlay: np.ndarray
    classes: tuple[str, ...]


def predict(
    config: str,
    checkpoint: str,
    images: str | Path | np.ndarray | Sequence[str | Path | np.ndarray],
    device: str | None = None,
    opacity: float = 0.5,
    options: dict[str, Any] | None = None,
) -> Iterator[Prediction]:
    """Segments images one by one, in the order of their names or as given.

    Args:
        config: Config of a segmentation run.
        checkpoint: File written by that run.
        images: A file, a folder, an array (H, W), (H, W, 3) or (H, W, 4), uint8 and BGR, or a
            sequence of files and arrays. Transparency is ignored.
        device: Where to run; a GPU if there is one.
        opacity: Of the colours of the classes, 0..1.
        options: Changes to the config by dotted name, those of the run.

    Yields:
        A `Prediction` per image, at the size of the image.

    Raises:
        ValueError: The checkpoint does not fit the config or its classes, or an image cannot be
            read.
        FileNotFoundError: There is no such config.
    """
    predictor = Predictor(config, checkpoint, device, options)
    for index, image in enumerate(list_images(images)):
        yield predictor(image, f'image_{index}', opacity)


class Predictor:
    """A trained model with the pipeline of its tests, and how it reads images."""

    def __init__(
        self,
        config: str,
        checkpoint: str,
        device: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        settings = load_config(config, options)
        for name in ('model', 'test_dataloader'):
            if settings.get(name) is None:
                raise ValueError(f'{config!r} has no {name}, without which nothing is predicted')
        init_default_scope(settings.get('default_scope', 'mmseg'))
        first, *others = innermost(settings.test_dataloader.dataset)
        self.classes, palette = _classes(config, first)
        self.palette = np.array(palette, np.uint8)[:, ::-1]  # BGR
        steps = _steps(first)
        if any(_steps(other) != steps for other in others):
            raise ValueError(
                f'{config!r}: the data sets in test_dataloader.dataset prepare images in different '
                'ways; a prediction needs one'
            )
        self.load = image_loader(settings.test_dataloader.dataset)
        self.pipeline = Compose(steps)
        self.model = load_trained(settings, checkpoint, device)
        self._check_classes(checkpoint)

    def _check_classes(self, checkpoint: str) -> None:
        field, count = 'test_dataloader.dataset', self.model.num_classes
        allowed = f'{len(self.classes)}, as many classes as {field} has'
        check(count == len(self.classes), 'model.decode_head.num_classes', count, allowed)
        check_class_names(read_content(checkpoint, verify=False), self.classes, field)

    @torch.inference_mode()
    def __call__(
        self, image: str | Path | np.ndarray, name: str = 'image', opacity: float = 0.5
    ) -> Prediction:
        """Segments an image."""
        if isinstance(image, str | Path):
            name = Path(image).stem
        pixels = _read(image, self.load)
        try:
            data = self.pipeline({'img_path': str(name), **self.load.entries(pixels)})
        except cv2.error as error:
            height, width = pixels.shape[:2]
            what = f'{name}, of {width}x{height} pixels, is nothing that the pipeline can change'
            raise ValueError(f'{what}: {" ".join(str(error).split())}') from error
        batch = {key: [value] for key, value in data.items()}
        (sample,) = self.model.test_step(batch)
        labels = sample.pred_sem_seg.data[0].to(torch.uint8).cpu().numpy()
        return Prediction(name, labels, self._overlay(pixels, labels, opacity), self.classes)

    def _overlay(self, pixels: np.ndarray, labels: np.ndarray, opacity: float) -> np.ndarray:
        mixed = in_bgr(pixels) * (1 - opacity) + self.palette[labels] * opacity
        return mixed.round().astype(np.uint8)


def _steps(dataset: Any) -> list[Any]:
    """What a data set's pipeline does with an image at hand."""
    return [step for step in dataset.get('pipeline', ()) if step.type not in LOADING]


def _classes(config: str, dataset: Any) -> tuple[tuple[str, ...], list[Sequence[int]]]:
    """Names and colours; `metainfo` of a config may choose some of its data set's classes."""
    found = DATASETS.get(dataset.type)
    if not (isinstance(found, type) and issubclass(found, BaseSegDataset)):
        raise ValueError(
            f'{config!r} is no config of segmentation: its data set {dataset.type!r} is not one of '
            "mmseg's kind"
        )
    try:
        metainfo = complete_metainfo(found, dataset.get('metainfo'))
    except ValueError as error:
        raise ValueError(f'{config!r}: {error}') from error
    return tuple(metainfo['classes']), metainfo['palette']


def list_images(images: Any) -> list[Any]:
    """The files and arrays that `predict` was asked for."""
    if isinstance(images, np.ndarray):
        return [images]
    if not isinstance(images, str | Path):
        return list(images)
    if not Path(images).is_dir():
        return [images]
    files = sorted(p for p in Path(images).iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ValueError(f'{images} holds no image ({", ".join(sorted(IMAGE_SUFFIXES))})')
    return files


def _read(image: str | Path | np.ndarray, load: LoadImage) -> np.ndarray:
    if isinstance(image, str | Path):
        if not Path(image).is_file():
            raise ValueError(f'image {str(image)!r} does not exist')
        return load.read(str(image))
    pixels = _checked(image)
    if load.color_type.startswith('grayscale'):
        pixels = mmcv.bgr2gray(pixels)
    return load.shifted(pixels)


def _checked(image: np.ndarray) -> np.ndarray:
    """Pixels (H, W, 3) uint8, BGR, of an array at hand."""
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or 0 in image.shape:
        raise ValueError(f'image: {image.dtype} {image.shape} must be uint8 (H, W), (H, W, 3 or 4)')
    if image.ndim == 2:
        return mmcv.gray2bgr(image)
    if image.shape[2] not in (3, 4):
        raise ValueError(f'image: {image.dtype} {image.shape} must be uint8 (H, W), (H, W, 3 or 4)')
    return np.ascontiguousarray(image[..., :3])
