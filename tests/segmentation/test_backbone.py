from typing import Any

import pytest
import torch
from mmseg.models import VisionTransformer as MMSegViT
from mmseg.registry import MODELS

from vqmoe_vision.moe import METHODS
from vqmoe_vision.segmentation import TimmViT

from .conftest import tiny_backbone

DINOV3 = 'vit_small_patch16_dinov3'


def build(*args: Any, **kwargs: Any) -> TimmViT:
    return MODELS.build(tiny_backbone(*args, **kwargs)).eval()


@pytest.mark.parametrize(
    'name', ['vit_tiny_patch16_224', DINOV3, *(f'vit_tiny_{m}' for m in METHODS)]
)
@pytest.mark.parametrize(
    ('height', 'width', 'rows', 'columns'),
    [(32, 32, 4, 4), (37, 50, 5, 7), (1, 9, 1, 2), (8, 200, 1, 25)],
)
def test_any_size(name: str, height: int, width: int, rows: int, columns: int) -> None:
    (features,) = build(name)(torch.randn(2, 3, height, width))
    assert features.shape == (2, 12, rows, columns)
    assert features.isfinite().all()


def test_last_features_are_the_normalised_tokens_of_the_timm_model() -> None:
    backbone = build()
    images = torch.randn(2, 3, 32, 32)
    tokens = backbone.model.forward_features(images)[:, backbone.model.num_prefix_tokens :]
    (features,) = backbone(images)
    torch.testing.assert_close(features.flatten(2).transpose(1, 2), tokens)


def test_every_parameter_has_a_gradient() -> None:
    for name in ('vit_tiny_patch16_224', DINOV3):
        for options in ({}, dict(out_indices=(0,)), dict(norm=False)):
            backbone = build(name, **options)
            sum(level.square().sum() for level in backbone(torch.randn(1, 3, 32, 32))).backward()
            assert all(p.grad is not None for p in backbone.parameters()), (name, options)


@pytest.mark.parametrize(
    ('field', 'value'),
    [
        ('model_name', 'vit_tiny_nothing'),
        ('model_name', 'resnet18'),
        *(('norm_eps', value) for value in (0.0, 1e6, '1e-6')),
        *(('out_indices', value) for value in ((1, 0), (2,), -2, ())),
    ],
)
def test_mistakes(field: str, value: Any) -> None:
    config = {**tiny_backbone('vit_tiny_patch16_224'), field: value}
    with pytest.raises(ValueError, match=f'^{field}='):
        MODELS.build(config)


@pytest.mark.parametrize('prefix', ['backbone.', ''])
def test_weights_of_mmsegs_own_backbone_compute_the_same(tmp_path: Any, prefix: str) -> None:
    theirs = MMSegViT(
        img_size=32, patch_size=8, embed_dims=12, num_layers=2, num_heads=3, final_norm=True,
        norm_cfg=dict(type='LN', eps=1e-6),
    )  # fmt: skip
    theirs.eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    path = tmp_path / 'theirs.pth'
    torch.save({f'{prefix}{name}': value for name, value in theirs.state_dict().items()}, path)
    backbone = build('vit_tiny_patch16_224', checkpoint=str(path))
    backbone.init_weights()
    image = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(backbone(image)[0], theirs(image)[0], rtol=1e-4, atol=1e-5)
