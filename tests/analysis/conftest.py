"""Tiny models of every method, and of every preset and trial that runs other code."""

from io import BytesIO
from typing import Any

import pytest
import timm
import torch
from matplotlib.figure import Figure
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

import vqmoe_vision.models  # noqa: F401  registers the models

from ..variants import VARIANTS

# 16 patches and a class token per image; block 1 is MoE
TINY = dict(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3)
TINY |= {'num_experts': 4}


def make(method: str, **options: Any) -> VisionTransformer:
    torch.manual_seed(0)
    return timm.create_model(f'vit_tiny_{method}', **{**TINY, **options}).eval()


@pytest.fixture
def unpainted(monkeypatch) -> None:
    """Pictures are composed and empty: painting them is most of a report's time."""
    blank = BytesIO()
    Image.new('RGB', (8, 8)).save(blank, 'png')
    monkeypatch.setattr(Figure, 'savefig', lambda _, file, **__: file.write(blank.getvalue()))


@pytest.fixture(params=VARIANTS)
def tiny_variant(request) -> VisionTransformer:
    """A tiny model of each method, preset and trial in turn."""
    method, options = VARIANTS[request.param]
    return make(method, **options)
