"""Test images of a classification config, or those of a folder, for a survey of the routing."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from mmengine.config import ConfigDict
from mmengine.registry import DATASETS

from vqmoe_vision.analysis.source import Sample, Source, image_files
from vqmoe_vision.models.normalization import Normalization
from vqmoe_vision.moe.config import check

from .datasets import load_image
from .transforms import normalization_of, normalized_as

_FIELD = 'test_dataloader.dataset.transform'


class _Samples(Sequence):
    def __init__(self, found: Sequence, read: Callable[[Any], tuple[Any, Any]]) -> None:
        self.found, self.read = found, read

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, index: Any) -> Sample:
        return Sample(*self.read(self.found[index]))


def source(dataset: ConfigDict, weights: Normalization | None, folder: str | None = None) -> Source:
    """What a survey of a classifier looks at."""
    transform: Any = normalized_as(dataset.transform, weights, _FIELD)
    found = normalization_of(transform)
    check(found is not None, _FIELD, dataset.transform, 'one that ends in a Normalize')
    assert found is not None
    if folder is not None:
        files = image_files(folder)
        samples = _Samples(files, lambda file: (transform(load_image(str(file))), None))
        return Source(samples, [file.name for file in files], None, found)
    built = DATASETS.build(dataset)
    built.transform = transform
    samples = _Samples(built, lambda pair: (pair[0], torch.tensor(pair[1])))
    names = [f'image {i}' for i in range(len(built))]
    return Source(samples, names, list(built.metainfo['classes']), found)
