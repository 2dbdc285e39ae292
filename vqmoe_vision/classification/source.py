"""Test images of a classification config, or those of a folder, for a survey of the routing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import ConfigDict
from mmengine.registry import DATASETS, TRANSFORMS
from torchvision import transforms

from vqmoe_vision.analysis.normalization import Normalization
from vqmoe_vision.analysis.source import Sample, Source, image_files

from .datasets import ImageClassification, load_image


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


def source(dataset: ConfigDict, folder: str | None = None) -> Source:
    """What a survey of a classifier looks at.

    Args:
        dataset: Config of the data set of its tests.
        folder: Images without labels in its place, which its transform prepares.

    Raises:
        ValueError: Images are missing, laid out otherwise, or not normalised at the end.
    """
    if folder is not None:
        files = image_files(folder)
        transform = TRANSFORMS.build(dataset.transform)
        names = [file.name for file in files]
        return Source(_Files(files, transform), names, None, _normalization(transform))
    built = DATASETS.build(dataset)
    classes = list(built.metainfo['classes'])
    names = [f'image {i}' for i in range(len(built))]
    return Source(_Labelled(built), names, classes, _normalization(built.transform))


def _normalization(transform: Any) -> Normalization:
    for step in reversed(getattr(transform, 'transforms', [])):
        if isinstance(step, transforms.Normalize):
            mean, std = (torch.as_tensor(v).flatten().tolist() for v in (step.mean, step.std))
            return Normalization(tuple(mean), tuple(std))
    raise ValueError('test_dataloader.dataset.transform does not end in a Normalize of torchvision')
