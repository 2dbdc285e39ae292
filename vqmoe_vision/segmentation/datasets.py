"""Segmentation data sets that say what is missing, where it belongs and where to get it."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from mmengine.logging import print_log
from mmseg.datasets import ADE20KDataset, BaseSegDataset, CityscapesDataset, PascalContextDataset59
from mmseg.datasets.transforms import LoadAnnotations
from mmseg.registry import DATASETS

from vqmoe_vision.engine.config import STOCK_LOADING, renamed
from vqmoe_vision.engine.images import (
    DIGITS,
    SCENE_SIDES,
    TrainingPart,
    digit_scans,
    digit_scene,
)
from vqmoe_vision.engine.seeding import seed_sample
from vqmoe_vision.moe.config import check

from .transforms import LOADING, UNREADABLE, named

PARTS = ('all', 'train', 'dev')
_PAGE = 'docs/how-to/segmentation.md says where to get the data set, and how to lay it out'


def _rgb(colours: str) -> list[list[int]]:
    return [list(bytes.fromhex(colour)) for colour in colours.split()]


def complete_metainfo(dataset: type[BaseSegDataset], metainfo: Mapping | None) -> dict:
    """The `metainfo` that a data set of a config has, without loading it."""
    empty = type('Empty', (BaseSegDataset,), {'METAINFO': dataset.METAINFO})
    return empty(metainfo=coloured(dataset, metainfo), lazy_init=True).metainfo


def coloured(dataset: type[BaseSegDataset], metainfo: Mapping | None) -> dict | None:
    """The `metainfo` of a config with names of a file, and with colours of chosen classes."""
    chosen, own = dict(metainfo or {}), dataset.METAINFO
    if 'classes' not in {**own, **chosen}:
        raise ValueError(
            f'{dataset.__name__} needs metainfo=dict(classes=(...)), the names of labels 0, 1, ...'
        )
    if isinstance(names := chosen.get('classes'), str):
        check(Path(names).is_file(), 'metainfo.classes', names, 'a tuple of names, or a file')
        # mmseg would take blank lines at the end for classes
        chosen['classes'] = Path(names).read_text().rstrip().splitlines()
    classes = chosen.get('classes', own.get('classes'))
    unique = len(classes) == len({*classes}) and all(str(name).strip() for name in classes)
    check(unique, 'metainfo.classes', classes, 'names, each of one label')
    if 'classes' in chosen and 'palette' not in chosen and {'classes', 'palette'} <= own.keys():
        # mmseg gives those of another order the colours of the data set's order
        colours = dict(zip(own['classes'], own['palette'], strict=True))
        chosen['palette'] = [colours.get(name, [0, 0, 0]) for name in chosen['classes']]
    return chosen or None


def part_indices(num_pairs: int, part: str, dev_size: int) -> list[int]:
    """Which pairs belong to a part, always the same."""
    check(part in PARTS, 'part', part, f'one of {PARTS}')
    if part == 'all':
        return list(range(num_pairs))
    check(0 < dev_size < num_pairs, 'dev_size', dev_size, f'from 1 to {num_pairs - 1}, of pairs')
    # about twenty neighbours, such as frames of a video, are set aside together
    blocks = np.array_split(np.arange(num_pairs), -(-num_pairs // 20))
    drawn = [blocks[i] for i in np.random.default_rng(0).permutation(len(blocks))]
    dev = np.concatenate(drawn)[:dev_size].tolist()
    return sorted(dev if part == 'dev' else {*range(num_pairs)} - {*dev})


def check_label_maps(dataset: Any, ignore_index: int) -> None:
    """Refuse label maps of one class alone, and warn where most pixels are ignored.

    Args:
        dataset: The training data, of which up to 200 label maps are read, spread evenly.
        ignore_index: The label that no loss counts.

    Raises:
        ValueError: Other labels than one class and `ignore_index` are in none of the label maps.
    """
    indices = np.unique(np.linspace(0, len(dataset) - 1, min(200, len(dataset))).astype(int))
    samples = [dataset.get_data_info(int(index)) for index in indices]
    samples = [sample for sample in samples if sample.get('seg_map_path')]
    load_labels, counts = LoadAnnotations(), np.zeros(256, np.int64)
    for sample in samples:
        with suppress(*UNREADABLE):  # whoever loads the sample for training names its file
            label_map = load_labels.transform(dict(sample))['gt_seg_map']
            counts += np.bincount(label_map.ravel().astype(np.uint8), minlength=256)
    if not counts.any() or len(dataset.metainfo['classes']) < 2:
        return
    ignored_share = counts[ignore_index] / counts.sum()
    classes = np.delete(counts, ignore_index).nonzero()[0]
    path, mend = samples[0]['seg_map_path'], 'reduce_zero_label or metainfo'
    if len(classes) < 2:
        raise ValueError(
            f'{path} and {len(samples) - 1} other label maps hold the class {classes.tolist()} and '
            f'the ignored {ignore_index} alone: see {mend} in docs/how-to/own-data.md'
        )
    if ignored_share > getattr(dataset, 'max_ignored_share', 0.95):
        print_log(
            f'{ignored_share:.1%} of the pixels of {len(samples)} label maps, such as {path}, are '
            f'ignored: see {mend}, or set max_ignored_share=1.0 in train_dataloader.dataset',
            'current',
            logging.WARNING,
        )


@DATASETS.register_module()
class CheckedDataset(BaseSegDataset):
    """A folder of images and one of label maps, complete or refused.

    Without a `palette`, mmseg generates one, always the same for a number of classes.

    Args:
        part: 'all' of the pairs, or 'train' or 'dev': what is set aside to choose by, always the
            same.
        dev_size: Number of pairs of 'dev', which 'train' leaves out.
        max_ignored_share: Share of ignored pixels above which a training warns; 1 never does.
        metainfo: `classes`, a sequence of names or a file with one per line, and `palette`, a
            colour (R, G, B) of 0..255 for each; of a data set with classes, some of them.
        **kwargs: As mmseg's `BaseSegDataset`; `data_prefix` without `seg_map_path`, or with None,
            is for images without label maps.

    Attributes:
        source: Where to get the data set, and how it is laid out; part of the messages.

    Raises:
        ValueError: Classes and palette do not fit, the files are not complete, or there is no such
            part.
    """

    source = 'docs/how-to/own-data.md says how to lay out a data set'

    def __init__(
        self,
        metainfo: dict | None = None,
        part: str = 'all',
        dev_size: int = 0,
        max_ignored_share: float = 0.95,
        **kwargs: Any,
    ) -> None:
        metainfo = coloured(type(self), metainfo)
        if 'data_prefix' in kwargs:
            # the command line cannot leave out what a config has
            named = {kind: f for kind, f in kwargs['data_prefix'].items() if f is not None}
            check('img_path' in named, 'data_prefix.img_path', None, 'the folder of the images')
            kwargs['data_prefix'] = named
        # a config has the stock names, for which mmseg's inference looks in a pipeline
        kwargs['pipeline'] = renamed(kwargs.get('pipeline', []), STOCK_LOADING, set())
        check(0 <= max_ignored_share <= 1, 'max_ignored_share', max_ignored_share, 'from 0 to 1')
        self.part, self.dev_size = part, dev_size
        self.max_ignored_share = max_ignored_share
        super().__init__(metainfo=metainfo, **kwargs)

    @property
    def training_part(self) -> TrainingPart:
        """Which part of which pairs these are."""
        files = map(Path.resolve, map(Path, (self.data_prefix['img_path'], self.ann_file)))
        return TrainingPart((*map(str, files), self.img_suffix), self.part, self.dev_size)

    def load_data_list(self) -> list[dict]:
        """Finds the pairs, and tells `LoadAnnotations` how many classes there are."""
        folders = [self.data_prefix.get(kind) for kind in ('img_path', 'seg_map_path')]
        problems = [
            f'{path} does not exist'
            for path in (*folders, self.ann_file)
            if path and not Path(path).exists()
        ]
        pairs = [] if problems else super().load_data_list()
        if not pairs:
            problems.append(f'{self.ann_file or f"{folders[0]}/*{self.img_suffix}"} names no image')
        problems += [
            f'{pair["img_path"]} has no label map {file}'
            for pair in pairs
            if (file := pair.get('seg_map_path')) is not None and not Path(file).is_file()
        ]
        if problems:
            raise ValueError(f'{problems[0]}; {self.source}')
        return [
            dict(pairs[i], num_classes=len(self.metainfo['classes']))
            for i in part_indices(len(pairs), self.part, self.dev_size)
        ]

    def prepare_data(self, idx: int) -> Any:
        """Loads and augments a pair by its seed; names an image that a transform cannot take."""
        seed_sample(idx)
        with named(self.get_data_info(idx)['img_path']):
            return super().prepare_data(idx)


@DATASETS.register_module()
class ADE20K(CheckedDataset, ADE20KDataset):
    """ADE20K with 150 classes; label 0 in the files is everything else, and ignored."""

    source = _PAGE


@DATASETS.register_module()
class PascalContext59(CheckedDataset, PascalContextDataset59):
    """Pascal Context with 59 classes; label 0 in the files is background, and ignored."""

    source = _PAGE


@DATASETS.register_module()
class Cityscapes(CheckedDataset, CityscapesDataset):
    """Cityscapes with 19 classes."""

    source = _PAGE


@DATASETS.register_module()
class CamVid(CheckedDataset):
    """CamVid with 11 classes; 255 is void.

    Args:
        img_suffix: Ending of the images' names.
        seg_map_suffix: Ending of the label maps' names.
        **kw: Passed on to `CheckedDataset`.
    """

    METAINFO: ClassVar = dict(
        classes=(
            'sky', 'building', 'pole', 'road', 'pavement', 'tree',
            'sign symbol', 'fence', 'car', 'pedestrian', 'bicyclist',
        ),
        palette=_rgb(
            '808080 800000 c0c080 804080 0000c0 808000 c08080 404080 400080 404000 0080c0'
        ),
    )  # fmt: skip
    source = _PAGE

    def __init__(self, img_suffix: str = '.jpg', seg_map_suffix: str = '.png', **kw: Any) -> None:
        super().__init__(
            img_suffix=img_suffix, seg_map_suffix=seg_map_suffix, reduce_zero_label=False, **kw
        )


@DATASETS.register_module()
class DigitScenes(BaseSegDataset):
    """Scenes of handwritten digits, composed on the fly from scikit-learn's scans.

    A scene depends on its index, the split and the seed only. Each split has scans of its own.

    Args:
        split: 'train', 'dev' or 'test'.
        num_scenes: Length of the data set.
        size: Height and width of a scene in pixels.
        seed: Another seed makes other scenes of the same scans.
        pipeline: Transforms; those that load are left out, as there is no file. A config has them
            for what predicts files, such as mmseg's inferencer.

    Raises:
        ValueError: There is no such split, or the size is not possible.
    """

    METAINFO: ClassVar = dict(
        classes=('background', *DIGITS),
        palette=_rgb(
            '000000 e6194b 3cb44b ffe119 0082c8 f58230 911eb4 46f0f0 f032e6 d2f53c fabed4'
        ),
    )

    def __init__(
        self, split: str, num_scenes: int, size: int, pipeline: Sequence, seed: int = 0
    ) -> None:
        largest = SCENE_SIDES[1]
        check(size >= largest, 'size', size, f'at least {largest}, the side of a large digit')
        self._scans, self._digits = digit_scans(split)
        self._seeds = seed, ('train', 'test', 'dev').index(split)
        self.split, self.num_scenes, self.size = split, num_scenes, size
        super().__init__(
            pipeline=[step for step in pipeline if step['type'] not in LOADING],
            data_prefix=dict(img_path=None),
            reduce_zero_label=False,
        )

    def load_data_list(self) -> list[dict]:
        """An entry per scene; the path is a name for overlays, there is no such file."""
        return [
            dict(
                img_path=f'{self.split}_{index:05d}.png',
                label_map=None,
                reduce_zero_label=False,
                # validation compares at the original size: mmseg resizes what is listed
                seg_fields=['gt_seg_map'] if self.split == 'train' else [],
            )
            for index in range(self.num_scenes)
        ]

    def prepare_data(self, idx: int) -> Any:
        """Composes a scene and runs the pipeline on it, with the seed of its index."""
        seed_sample(idx)
        image, labels = self.scene(idx)
        info = {**self.get_data_info(idx), 'img': image, 'gt_seg_map': labels}
        return self.pipeline(info | dict.fromkeys(('img_shape', 'ori_shape'), labels.shape))

    def scene(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image (H, W, 3) uint8 BGR, and labels (H, W) uint8: 0, and d + 1 for strokes of d."""
        return digit_scene(self._scans, self._digits, self.size, (*self._seeds, index))
