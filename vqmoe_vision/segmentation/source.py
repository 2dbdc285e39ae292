"""What a survey of segmentation looks at: the middle of each image, in the trained size."""

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from mmcv.transforms import Compose
from mmengine.config import ConfigDict
from mmseg.registry import DATASETS
from torch import Tensor

from vqmoe_vision.analysis.source import Sample, Source, image_files
from vqmoe_vision.moe.config import check

from .loading import LOADING_LABELS
from .preprocessor import converts_channels, normalization_of


class _Crops(Sequence):
    def __init__(
        self, found: Sequence, read: Callable, preprocessor: Any, crop_size: tuple[int, int]
    ) -> None:
        self.found, self.read = found, read
        self.preprocessor, self.crop_size = preprocessor, crop_size

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, index: Any) -> Sample:
        data = self.read(self.found[index])
        inputs = data['inputs']
        image = self._middle(inputs).float()
        if converts_channels(self.preprocessor):
            image = image.flip(0)
        if self.preprocessor._enable_normalize:
            image = (image - self.preprocessor.mean.cpu()) / self.preprocessor.std.cpu()
        if 'gt_sem_seg' not in data['data_samples']:
            return Sample(image, None)
        label = data['data_samples'].gt_sem_seg.data
        # a test pipeline may resize the image before it loads the labels
        label = F.interpolate(label[None].float(), inputs.shape[-2:], mode='nearest')[0, 0].long()
        return Sample(image, self._middle(label))

    def _middle(self, pixels: Tensor) -> Tensor:
        (height, width), (most_height, most_width) = pixels.shape[-2:], self.crop_size
        top, left = max(height - most_height, 0) // 2, max(width - most_width, 0) // 2
        return pixels[..., top : top + most_height, left : left + most_width]


def source(
    dataset: ConfigDict, preprocessor: Any, crop_size: tuple[int, int], folder: str | None = None
) -> Source:
    """What a survey of a segmentor looks at."""
    normalization = normalization_of(preprocessor)
    kind = type(preprocessor).__name__
    check(normalization is not None, 'model.data_preprocessor.type', kind, "one of mmengine's kind")
    assert normalization is not None
    if folder is not None:
        files = image_files(folder)
        steps = Compose([step for step in dataset.pipeline if step.type not in LOADING_LABELS])
        crops = _Crops(files, lambda file: steps({'img_path': str(file)}), preprocessor, crop_size)
        return Source(crops, [file.name for file in files], None, normalization)
    built = DATASETS.build(dataset)
    names = [f'image {i}' for i in range(len(built))]
    classes = list(built.metainfo['classes'])
    return Source(_Crops(built, dict, preprocessor, crop_size), names, classes, normalization)
