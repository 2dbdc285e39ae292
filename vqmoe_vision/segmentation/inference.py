"""Predictions for images that need no data set: files, folders and arrays; `tools/predict.py`."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch
from mmcv.transforms import Compose
from mmengine.registry import init_default_scope
from mmengine.utils import track_iter_progress
from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS

from vqmoe_vision.engine.checkpoint import read_content
from vqmoe_vision.engine.cli import CHECKPOINT_HELP, CONFIG_HELP, load_config, run
from vqmoe_vision.engine.config import add_config_options, innermost
from vqmoe_vision.engine.hooks import check_class_names
from vqmoe_vision.engine.model import load_trained
from vqmoe_vision.moe.config import check

from .datasets import complete_metainfo
from .transforms import IMAGE_SUFFIXES, LOADING, LoadImage, image_loader, in_bgr, named


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
    for index, image in enumerate(_list_images(images)):
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


def _list_images(images: Any) -> list:
    """The files and arrays that `predict` was asked for."""
    if not isinstance(images, str | Path):
        return [images] if isinstance(images, np.ndarray) else list(images)
    if not Path(images).is_dir():
        return [images]
    if files := sorted(p for p in Path(images).iterdir() if p.suffix.lower() in IMAGE_SUFFIXES):
        return files
    raise ValueError(f'{images} holds no image ({", ".join(sorted(IMAGE_SUFFIXES))})')


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


def main(argv: Sequence[str] | None = None) -> None:
    """Segments an image or a folder of images."""
    parser = argparse.ArgumentParser(description='Segment images.')
    parser.add_argument('config', help=CONFIG_HELP)
    parser.add_argument('checkpoint', help=CHECKPOINT_HELP)
    parser.add_argument('images', nargs='+', help='image files, or folders of images')
    parser.add_argument(
        '--out-dir',
        type=Path,
        default=Path('work_dirs/predictions'),
        help='gets overlays/<name>.png and labels/<name>.png (class indices)',
    )
    parser.add_argument('--device', help='where to run (default: a GPU if there is one)')
    parser.add_argument('--opacity', type=float, default=0.5, help='of the colours, 0 to 1')
    add_config_options(parser)
    run(parser, argv, _predict)


def _predict(args: argparse.Namespace) -> None:
    check(0 <= args.opacity <= 1, '--opacity', args.opacity, 'from 0 to 1')
    files = [Path(file) for images in args.images for file in _list_images(images)]
    seen: dict[str, Path] = {}
    for file in files:
        same = seen.setdefault(file.stem, file)
        check(same is file, 'images', str(file), f'one without the output of {same}')
    predictor = Predictor(args.config, args.checkpoint, args.device, args.cfg_options)
    for file in track_iter_progress(files, file=sys.stdout):
        result = predictor(file, opacity=args.opacity)
        mmcv.imwrite(result.overlay, str(args.out_dir / 'overlays' / f'{result.name}.png'))
        mmcv.imwrite(result.labels, str(args.out_dir / 'labels' / f'{result.name}.png'))
    print(f'\nwrote {args.out_dir}/overlays and {args.out_dir}/labels')
