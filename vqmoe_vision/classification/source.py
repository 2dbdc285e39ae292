"""Test images of a classification config, or those of a folder, for a survey of the routing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import ConfigDict
from mmengine.registry import DATASETS

from vqmoe_vision.analysis.source import Sample, Source, image_files
from vqmoe_vision.models.normalization import Normalization

from .datasets import ImageClassification, load_image
from .transforms import normalization_of, normalized_as

_FIELD = 'test_dataloader.dataset.transform'


class _Labelled(Sequence):
    def __init__(self, dataset: ImageClassification) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Sample:
        image, target = self.dataset[index]
        return Sample(image, torch.tensor(target))


class _Files(Sequence):
    def __init__(self, files: Sequence[Path], transform: Any) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> Sample:
        return Sample(self.transform(load_image(str(self.files[index]))), None)


def source(dataset: ConfigDict, weights: Normalization | None, folder: str | None = None) -> Source:
    """What a survey of a classifier looks at."""
    if folder is not None:
        files = image_files(folder)
        transform = normalized_as(dataset.transform, weights, _FIELD)
        names = [file.name for file in files]
        return Source(_Files(files, transform), names, None, _normalization(transform))
    built = DATASETS.build(dataset)
    if weights is not None:
        built.normalize_as(weights, _FIELD)
    classes = list(built.metainfo['classes'])
    names = [f'image {i}' for i in range(len(built))]
    return Source(_Labelled(built), names, classes, _normalization(built.transform))


def _normalization(transform: Any) -> Normalization:
    found = normalization_of(transform)
    if found is None:
        raise ValueError(f'{_FIELD} does not end in a Normalize of torchvision')
    return found
