"""Predictions for images that need no data set: files, folders and arrays; `tools/predict.py`."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

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
from vqmoe_vision.engine.images import list_images
from vqmoe_vision.engine.model import load_trained
from vqmoe_vision.moe.config import check

from .datasets import complete_metainfo
from .transforms import LOADING, LoadImage, image_loader, in_bgr, named


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
    options: dict | None = None,
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
    if isinstance(images, str | Path):
        images = list_images(images)
    elif isinstance(images, np.ndarray):
        images = [images]
    for index, image in enumerate(images):
        yield predictor(image, f'image_{index}', opacity)


class Predictor:
    """A trained model with the pipeline of its tests, and how it reads images."""

    def __init__(
        self, config: str, checkpoint: str, device: str | None = None, options: dict | None = None
    ) -> None:
        settings = load_config(config, options)
        for name in ('model', 'test_dataloader'):
            check(settings.get(name) is not None, f'{config}: {name}', None, 'a config')
        init_default_scope(settings.get('default_scope', 'mmseg'))
        field, dataset = 'test_dataloader.dataset', settings.test_dataloader.dataset
        first, *others = innermost(dataset)
        kind = DATASETS.get(first.type)
        fits = isinstance(kind, type) and issubclass(kind, BaseSegDataset)
        check(fits, f'{config}: {field}.type', first.type, "a data set of mmseg's kind")
        metainfo = complete_metainfo(kind, first.get('metainfo'))
        self.classes = tuple(metainfo['classes'])
        self.palette = np.array(metainfo['palette'], np.uint8)[:, ::-1]  # BGR
        steps, *different = (
            [step for step in each.get('pipeline', ()) if step.type not in LOADING]
            for each in (first, *others)
        )
        alike = all(other == steps for other in different)
        check(alike, f'{config}: {field}', dataset.type, 'data sets that prepare images alike')
        self.load = image_loader(dataset)
        self.pipeline = Compose(steps)
        self.model = load_trained(settings, checkpoint, device)
        count, allowed = self.model.num_classes, f'{len(self.classes)}, as many as {field} has'
        check(count == len(self.classes), 'model.decode_head.num_classes', count, allowed)
        check_class_names(read_content(checkpoint, verify=False), self.classes, field)

    @torch.inference_mode()
    def __call__(
        self, image: str | Path | np.ndarray, name: str = 'image', opacity: float = 0.5
    ) -> Prediction:
        """Segments an image."""
        name = Path(image).stem if isinstance(image, str | Path) else name
        pixels = _read(image, self.load)
        height, width = pixels.shape[:2]
        with named(f'{name}, of {width}x{height} pixels,'):
            data = self.pipeline({'img_path': str(name), **self.load.entries(pixels)})
        (sample,) = self.model.test_step({key: [value] for key, value in data.items()})
        labels = sample.pred_sem_seg.data[0].to(torch.uint8).cpu().numpy()
        mixed = in_bgr(pixels) * (1 - opacity) + self.palette[labels] * opacity
        return Prediction(name, labels, mixed.round().astype(np.uint8), self.classes)


def _read(image: str | Path | np.ndarray, load: LoadImage) -> np.ndarray:
    if isinstance(image, str | Path):
        if not Path(image).is_file():
            raise ValueError(f'image {str(image)!r} does not exist')
        return load.read(str(image))
    shape = image.shape
    known = len(shape) > 1 and shape[2:] in ((), (3,), (4,))
    fits = known and 0 not in shape and image.dtype == np.uint8
    check(fits, 'image', f'{image.dtype} {shape}', 'uint8 (H, W), (H, W, 3) or (H, W, 4)')
    pixels = np.ascontiguousarray(in_bgr(image)[..., :3])
    if load.color_type.startswith('grayscale'):
        pixels = mmcv.bgr2gray(pixels)
    return load.shifted(pixels)


class Overlays:
    """What `tools/predict.py` writes of images: `overlays/NAME.png` and `labels/NAME.png`."""

    def __init__(self, args: argparse.Namespace, files: Sequence[Path]) -> None:
        check(args.topk is None, '--topk', args.topk, 'left out, it is for a classifier')
        self._opacity, self._out = 0.5 if args.opacity is None else args.opacity, args.out_dir
        check(0 <= self._opacity <= 1, '--opacity', args.opacity, 'from 0 to 1')
        seen: dict[str, Path] = {}
        for file in files:
            same = seen.setdefault(file.stem, file)
            check(same is file, 'images', str(file), f'one without the output of {same}')
        options = args.config, args.checkpoint, args.device, args.cfg_options
        self._predictor = Predictor(*options)

    def add(self, file: Path) -> None:
        """Segments an image and writes both."""
        result = self._predictor(file, opacity=self._opacity)
        for folder, pixels in (('overlays', result.overlay), ('labels', result.labels)):
            mmcv.imwrite(pixels, str(self._out / folder / f'{result.name}.png'))

    def end(self) -> str:
        """What is said in the end."""
        return f'wrote {self._out}/overlays and {self._out}/labels'
