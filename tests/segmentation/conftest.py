"""What the tests of segmentation share: tiny models, and data sets written to a folder."""

from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

import vqmoe_vision.segmentation  # noqa: F401  registers everything

from .. import on_meta

TINY = dict(patch_size=8, depth=2, embed_dim=12, num_heads=3, img_size=32)
# heads leave their width and their heads to the backbone
MASK = dict(type='SegmenterMaskTransformerHead', num_layers=1, num_classes=4)
PREPROCESSOR = dict(type='CheckedPreProcessor', mean=[127.5] * 3, std=[127.5] * 3)
PREPROCESSOR |= dict(bgr_to_rgb=True, size=(32, 32))


@pytest.fixture(autouse=True)
def _scope() -> None:
    init_default_scope('mmseg')


def tiny_backbone(model_name: str = 'vit_tiny_vqmoe', **kwargs: Any) -> dict[str, Any]:
    experts = {} if 'patch16' in model_name else {'num_experts': 2}
    return dict(type='TimmViT', model_name=model_name, **{**TINY, **experts, **kwargs})


def tiny_segmentor(model_name: str = 'vit_tiny_vqmoe', **kwargs: Any) -> Any:
    config = dict(
        type='MoeEncoderDecoder',
        data_preprocessor=dict(PREPROCESSOR, test_cfg=dict(size_divisor=8)),
        backbone=tiny_backbone(model_name, **kwargs.pop('backbone', {})),
        decode_head=dict(MASK, dropout_ratio=0.0, drop_path_rate=0.0),
        test_cfg=dict(mode='whole'),
    )
    return MODELS.build(ConfigDict({**config, **kwargs}))


def build(config: Config, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model without memory; mmseg's mask transformer reads the values of one tensor."""
    monkeypatch.setattr(torch, 'linspace', partial(torch.linspace, device='cpu'))
    with on_meta():
        return MODELS.build(config.model).eval()


def training_batch(model: Any, size: int = 32) -> dict[str, Any]:
    """Two images with label maps, after the data preprocessor."""
    samples = []
    for _ in range(2):
        sample = SegDataSample(metainfo=dict(img_shape=(size, size), ori_shape=(size, size)))
        sample.set_data({'gt_sem_seg': PixelData(data=torch.randint(4, (1, size, size)))})
        samples.append(sample)
    inputs = [torch.randint(256, (3, size, size), dtype=torch.uint8) for _ in range(2)]
    return model.data_preprocessor(dict(inputs=inputs, data_samples=samples), True)


def write_pair(root: Path, image: str, label: str, labels: np.ndarray, **kw: Any) -> None:
    size = kw.get('image_size', labels.shape)
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    for path, array in ((root / image, pixels), (root / label, labels.astype(np.uint8))):
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), array)
