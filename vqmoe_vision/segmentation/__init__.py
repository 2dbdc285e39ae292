"""Segmentation on mmseg: a backbone around any timm ViT, a segmentor, data sets, augmentation.

Importing this package registers what `configs/segmentation` names, under names of its own.
"""

import contextlib
import io
import warnings

try:
    import mmcv  # noqa: F401  without the extra, this comes first to what is missing
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(f"{missing}; segmentation needs: pip install '.[seg]'") from None

with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
    warnings.simplefilter('ignore')  # it tells of packages and operators that nobody asked for
    import mmseg.datasets
    import mmseg.models  # noqa: F401

import vqmoe_vision.analysis.validation_picture
import vqmoe_vision.engine  # noqa: F401  registers hooks and optimizer wrappers

from . import datasets, mmseg_patches, transforms, visualization  # noqa: F401
from .backbone import TimmViT
from .inference import Prediction, predict
from .segmentor import MoeEncoderDecoder

__all__ = [
    'MoeEncoderDecoder',
    'Prediction',
    'TimmViT',
    'datasets',
    'predict',
    'transforms',
    'visualization',
]
