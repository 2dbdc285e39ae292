"""What a segmentor sees: batches as its weights want them, and in a survey middles of images."""

from collections.abc import Collection
from typing import Any

import torch.nn.functional as F
from mmcv.transforms import Compose
from mmengine.model import ImgDataPreprocessor
from mmseg.models.data_preprocessor import SegDataPreProcessor
from mmseg.registry import DATASETS, MODELS
from torch import Tensor

from vqmoe_vision.analysis.source import Sample, Source, image_files
from vqmoe_vision.engine.model import must_change
from vqmoe_vision.models.normalization import Normalization, stated_normalization
from vqmoe_vision.moe.config import check

from .transforms import LOADING_LABELS

_WHITE = 255.0
_FIELD = 'model.data_preprocessor'
_PER_CHANNEL = 'a list with a number from 0 to 255 for each channel'


@MODELS.register_module()
class CheckedPreProcessor(SegDataPreProcessor):
    """mmseg's data preprocessor, which waits for no copy to the device.

    Args:
        *args: As mmseg's.
        **kwargs: As mmseg's.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._non_blocking = True
        self.converts = converts_channels(self)
        self._channel_conversion = self.channel_conversion = False  # `forward` does it

    def forward(self, data: dict, training: bool = False) -> dict:
        """As mmseg's, of `inputs`, a list of (3, H, W) images, and `data_samples`."""
        data = self.cast_data(data)
        if self.converts:  # mmseg indexes with a list, which is copied to the device
            data['inputs'] = [x.flip(0) if x.size(0) == 3 else x for x in data['inputs']]
        return super().forward(data, training)


def converts_channels(preprocessor: Any) -> bool:
    """Whether images change from BGR to RGB; mmseg and its continuation name it otherwise."""
    names = ('converts', '_channel_conversion', 'channel_conversion')
    return any(getattr(preprocessor, name, False) for name in names)


def class_of(config: dict) -> Any:
    """What a config of a part of a model builds; None if nobody has registered it."""
    kind = config.get('type')
    return MODELS.get(kind) if isinstance(kind, str) else kind


def completed(config: dict) -> tuple[dict, tuple[str, ...]]:
    """A data preprocessor's config as mmseg takes it, and what it states of `mean` and `std`."""
    config = dict(config)
    scratch = config.pop('from_scratch', None)
    given = {name: config[name] for name in ('mean', 'std') if config.get(name) is not None}
    kind = class_of(config)
    if isinstance(kind, type) and issubclass(kind, ImgDataPreprocessor):
        for field, pair in ((_FIELD, given), (f'{_FIELD}.from_scratch', scratch or {})):
            for name, value in pair.items():
                check(isinstance(value, list | tuple), f'{field}.{name}', value, _PER_CHANNEL)
            stated_normalization(pair, f'{field}.', _WHITE)
    if scratch is None:
        return config, ('mean', 'std')
    return {**config, **scratch, **given}, tuple(given)


def normalization_of(preprocessor: Any) -> Normalization | None:
    """How a segmentor's data preprocessor normalises images; None if it is no affair of its."""
    if not isinstance(preprocessor, ImgDataPreprocessor):
        return None
    if not preprocessor._enable_normalize:
        return Normalization.of({'mean': [0.0], 'std': [1.0]}, _WHITE)
    values = {name: getattr(preprocessor, name).flatten().tolist() for name in ('mean', 'std')}
    return Normalization.of(values, _WHITE)


def follow(preprocessor: Any, weights: Normalization, stated: Collection[str]) -> None:
    """Lets a data preprocessor normalise images as the weights want it."""
    found = normalization_of(preprocessor)
    if found is not None and must_change(found, weights, stated, _FIELD, _WHITE):
        for name in ('mean', 'std'):
            levels = [value * _WHITE for value in getattr(weights, name)]
            setattr(preprocessor, name, preprocessor.mean.new_tensor(levels).view(-1, 1, 1))


def survey_source(
    dataset: Any, preprocessor: Any, crop_size: tuple[int, int], folder: str | None = None
) -> Source:
    """What a survey of a segmentor looks at: the middle of each image, in the trained size."""
    known: Any = normalization_of(preprocessor)
    check(known is not None, f'{_FIELD}.type', type(preprocessor).__name__, "mmengine's kind")

    def middle(pixels: Tensor) -> Tensor:
        (rows, columns), (height, width) = pixels.shape[-2:], crop_size
        top, left = max(rows - height, 0) // 2, max(columns - width, 0) // 2
        return pixels[..., top : top + height, left : left + width]

    def read(data: Any) -> Sample:
        inputs, labels = data['inputs'], data['data_samples'].get('gt_sem_seg')
        image = middle(inputs).float()
        if converts_channels(preprocessor):
            image = image.flip(0)
        if preprocessor._enable_normalize:
            image = (image - preprocessor.mean.cpu()) / preprocessor.std.cpu()
        if labels is None:
            return Sample(image, None)
        # a test pipeline may resize the image before it loads the labels
        label = F.interpolate(labels.data[None].float(), inputs.shape[-2:], mode='nearest')
        return Sample(image, middle(label[0, 0].long()))

    if folder is not None:
        steps = Compose([step for step in dataset.pipeline if step.type not in LOADING_LABELS])
        return Source(image_files(folder), lambda f: read(steps({'img_path': str(f)})), known)
    built = DATASETS.build(dataset) if isinstance(dataset, dict) else dataset
    return Source(built, read, known, list(built.metainfo['classes']))
