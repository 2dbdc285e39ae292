"""Segmentation on mmseg: a backbone around any timm ViT, a segmentor, data sets, augmentation.

Importing this package registers everything that `configs/segmentation` names.
"""

try:
    import mmcv  # noqa: F401  without the extra, this comes first to what is missing
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(f"{missing}; segmentation needs: pip install '.[seg]'") from None

import vqmoe_vision.engine  # noqa: F401  registers hooks and optimizer wrappers

from . import (  # noqa: F401  _upstream first
    _upstream,
    batch,
    data,
    evaluation,
    precision,
    transforms,
    visualization,
    waits,
)
from .backbone import TimmViT
from .inference import Prediction, predict
from .segmentor import MoeEncoderDecoder

__all__ = [
    'MoeEncoderDecoder',
    'Prediction',
    'TimmViT',
    'data',
    'predict',
    'transforms',
    'visualization',
    'waits',
]
