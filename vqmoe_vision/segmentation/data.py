"""Segmentation data sets that say what is missing, where it belongs and where to get it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import cv2
from mmengine.logging import print_log
from mmseg.datasets import (
    ADE20KDataset,
    BaseSegDataset,
    CityscapesDataset,
    PascalContextDataset59,
)
from mmseg.registry import DATASETS

from vqmoe_vision.engine import stock
from vqmoe_vision.engine.digits import DIGITS
from vqmoe_vision.engine.seeding import seed_sample
from vqmoe_vision.engine.stock import renamed
from vqmoe_vision.engine.training_data import TrainingPart
from vqmoe_vision.moe.config import check

from .loading import LOADING
from .metainfo import coloured
from .scenes import DigitScene, digit_scene_maker
from .splits import part_indices


class SeededDataset(BaseSegDataset):
    """A data set that augments with the seed that an index of `SeededInfiniteSampler` brings."""

    def __getitem__(self, idx: int) -> Any:
        """Loads and augments a sample."""
        seed_sample(idx)
        return super().__getitem__(idx)


@DATASETS.register_module()
class CheckedDataset(SeededDataset):
    """A folder of images and one of label maps, complete or refused.

    Without a `palette`, mmseg generates one, always the same for a number of classes.

    Args:
        part: 'all' of the pairs, or 'train' or 'dev': what is set aside to choose by, always the
            same.
        dev_size: Number of pairs of 'dev', which 'train' leaves out.
        metainfo: `classes`, a sequence of names or a file with one per line, whose blank lines at
            the end are none, and `palette`, a colour (R, G, B) of 0..255 for each; of a data set
            with classes of its own, some of them.
        **kwargs: As mmseg's `BaseSegDataset`; `data_prefix` without `seg_map_path`, or with None,
            is for images without label maps.

    Attributes:
        source: Where to get the data set, and how it is laid out; part of the messages.

    Raises:
        ValueError: Classes and palette do not fit, the files are not
            complete, several endings are given, or there is no such part.
    """

    source = 'docs/own-data.md says how to lay out a data set'

    def __init__(
        self,
        metainfo: dict[str, Any] | None = None,
        part: str = 'all',
        dev_size: int = 0,
        **kwargs: Any,
    ) -> None:
        metainfo = coloured(type(self), metainfo)
        for name in ('img_suffix', 'seg_map_suffix'):
            suffix = kwargs.get(name, '')
            allowed = 'one ending, by which an image and its label map are found'
            check(isinstance(suffix, str), name, suffix, allowed)
        if 'data_prefix' in kwargs:
            # the command line cannot leave out what a config has
            named = {kind: f for kind, f in kwargs['data_prefix'].items() if f is not None}
            check('img_path' in named, 'data_prefix.img_path', None, 'the folder of the images')
            kwargs['data_prefix'] = named
        # a config has the stock names, for which mmseg's inference looks in a pipeline
        kwargs['pipeline'] = renamed(kwargs.get('pipeline', []), stock.LOADING, set())
        self.part, self.dev_size = part, dev_size
        super().__init__(metainfo=metainfo, **kwargs)
        if 'palette' not in {**self.METAINFO, **(metainfo or {})}:
            print_log(
                f'{type(self).__name__}: metainfo has no palette, its colours are generated',
                logger='current',
            )

    @property
    def training_part(self) -> TrainingPart:
        """Which part of which pairs these are."""
        files = (self.data_prefix['img_path'], self.ann_file)
        source = (*(str(Path(file).resolve()) for file in files), self.img_suffix)
        return TrainingPart(source, self.part, self.dev_size)

    def load_data_list(self) -> list[dict[str, Any]]:
        """Finds the pairs, and tells `LoadAnnotations` how many classes there are."""
        for kind in ('img_path', 'seg_map_path'):
            folder = self.data_prefix.get(kind)
            if folder is not None and not Path(folder).is_dir():
                raise ValueError(f'{folder} does not exist; {self.source}')
        if self.ann_file and not Path(self.ann_file).is_file():
            raise ValueError(f'{self.ann_file} does not exist; {self.source}')
        pairs = super().load_data_list()
        if self.ann_file and not pairs:
            raise ValueError(f'{self.ann_file} names no image; {self.source}')
        if not pairs:
            folder, suffix = self.data_prefix['img_path'], self.img_suffix
            raise ValueError(f'{folder} holds no image that ends in {suffix}; {self.source}')
        absent = [
            pair
            for pair in pairs
            if 'seg_map_path' in pair and not Path(pair['seg_map_path']).is_file()
        ]
        if absent:
            raise ValueError(
                f'{len(absent)} of {len(pairs)} images have no label map: {absent[0]["img_path"]} '
                f'needs {absent[0]["seg_map_path"]}; {self.source}'
            )
        chosen = part_indices(len(pairs), self.part, self.dev_size)
        num_classes = len(self.metainfo['classes'])
        return [dict(pairs[i], num_classes=num_classes) for i in chosen]

    def prepare_data(self, idx: int) -> Any:
        """Loads and augments a pair; names an image that a transform cannot take."""
        try:
            return super().prepare_data(idx)
        except cv2.error as error:
            path = self.get_data_info(idx)['img_path']
            said = ' '.join(str(error).split())
            raise ValueError(f'{path} is nothing that the pipeline can change: {said}') from error


@DATASETS.register_module()
class ADE20K(CheckedDataset, ADE20KDataset):
    """ADE20K with 150 classes; label 0 in the files is everything else, and ignored."""

    source = (
        'expected ADEChallengeData2016/{images,annotations}/{training,validation}/*.{jpg,png}, '
        'from http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip; '
        'see docs/segmentation.md'
    )


@DATASETS.register_module()
class PascalContext59(CheckedDataset, PascalContextDataset59):
    """Pascal Context with 59 classes; label 0 in the files is background, and ignored."""

    source = (
        'expected VOCdevkit/VOC2010/{JPEGImages,SegmentationClassContext}, from '
        'https://www.cs.stanford.edu/~roozbeh/pascal-context/; see docs/segmentation.md'
    )


@DATASETS.register_module()
class Cityscapes(CheckedDataset, CityscapesDataset):
    """Cityscapes with 19 classes."""

    source = (
        'expected leftImg8bit/{train,val}/<city>/*_leftImg8bit.png and '
        'gtFine/{train,val}/<city>/*_gtFine_labelTrainIds.png, from '
        'https://www.cityscapes-dataset.com; see docs/segmentation.md'
    )


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
        palette=[
            [128, 128, 128], [128, 0, 0], [192, 192, 128], [128, 64, 128], [0, 0, 192],
            [128, 128, 0], [192, 128, 128], [64, 64, 128], [64, 0, 128], [64, 64, 0],
            [0, 128, 192],
        ],
    )  # fmt: skip
    source = (
        'expected images/{train,val}/*.jpg (or another img_suffix in the config) and '
        'annotations/{train,val}/*.png with labels 0-10 and 255, from '
        'http://mi.eng.cam.ac.uk/research/projects/VideoRec/CamVid/; see docs/segmentation.md'
    )

    def __init__(self, img_suffix: str = '.jpg', seg_map_suffix: str = '.png', **kw: Any) -> None:
        super().__init__(
            img_suffix=img_suffix, seg_map_suffix=seg_map_suffix, reduce_zero_label=False, **kw
        )


@DATASETS.register_module()
class DigitScenes(SeededDataset):
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
        ValueError: There is no such split, or the size or number is not possible.
    """

    METAINFO: ClassVar = dict(
        classes=('background', *DIGITS),
        palette=[
            [0, 0, 0], [230, 25, 75], [60, 180, 75], [255, 225, 25], [0, 130, 200],
            [245, 130, 48], [145, 30, 180], [70, 240, 240], [240, 50, 230], [210, 245, 60],
            [250, 190, 212],
        ],
    )  # fmt: skip

    def __init__(
        self, split: str, num_scenes: int, size: int, pipeline: Sequence, seed: int = 0
    ) -> None:
        if num_scenes < 1:
            raise ValueError(f'num_scenes={num_scenes} must be at least 1')
        self.split = split
        self.num_scenes = num_scenes
        self._make = digit_scene_maker(split, size, seed)
        super().__init__(
            pipeline=[step for step in pipeline if step['type'] not in LOADING],
            data_prefix=dict(img_path=None),
            reduce_zero_label=False,
        )

    def load_data_list(self) -> list[dict[str, Any]]:
        """An entry per scene; the path is a name for overlays, there is no such file."""
        # Validation compares at the original size: mmseg's transforms resize what is listed.
        seg_fields = ['gt_seg_map'] if self.split == 'train' else []
        return [
            dict(
                img_path=f'{self.split}_{index:05d}.png',
                label_map=None,
                reduce_zero_label=False,
                seg_fields=list(seg_fields),
            )
            for index in range(self.num_scenes)
        ]

    def scene(self, index: int) -> DigitScene:
        """Composes a scene."""
        return self._make(index)

    def prepare_data(self, idx: int) -> Any:
        """Composes a scene and runs the pipeline on it."""
        info = self.get_data_info(idx)
        scene = self.scene(idx)
        size = scene.labels.shape
        info.update(img=scene.image, gt_seg_map=scene.labels, img_shape=size, ori_shape=size)
        return self.pipeline(info)
