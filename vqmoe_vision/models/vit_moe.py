"""Vision transformers whose blocks hold mixture-of-experts layers, registered with timm.

`timm.create_model('vit_small_vqmoe', num_experts=16, moe_layers='last2')`: every argument of
timm's `VisionTransformer` and every option of the method's configuration dataclass is a keyword.

Only `blocks[i].mlp` differs from timm's ViT of the same size.
"""

from __future__ import annotations

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import PretrainedCfg, generate_default_cfgs, register_model

from ..moe.methods import METHODS
from .create import build
from .moe_vit import MoeVisionTransformer
from .weights import HUB_NAME

__all__ = ['SIZES']  # register_model adds each entry point


def _cfg() -> dict[str, Any]:
    return {
        'url': '',
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'pool_size': None,
        'crop_pct': 0.9,
        'interpolation': 'bicubic',
        'fixed_input_size': True,
        'mean': (0.5, 0.5, 0.5),
        'std': (0.5, 0.5, 0.5),
        'first_conv': 'patch_embed.proj',
        'classifier': 'head',
    }


# Of weights under `HUB_NAME`: trained on ImageNet-1k with configs/classification/imagenet.
TAG = 'in1k'
_TRAINED = {
    'mean': IMAGENET_DEFAULT_MEAN,
    'std': IMAGENET_DEFAULT_STD,
    'crop_pct': 0.875,
    'interpolation': 'bilinear',
}
SIZES: dict[str, dict[str, int]] = {
    'tiny': {'patch_size': 16, 'embed_dim': 192, 'depth': 12, 'num_heads': 3},
    'small': {'patch_size': 16, 'embed_dim': 384, 'depth': 12, 'num_heads': 6},
    'base': {'patch_size': 16, 'embed_dim': 768, 'depth': 12, 'num_heads': 12},
    'large': {'patch_size': 16, 'embed_dim': 1024, 'depth': 24, 'num_heads': 16},
}


def _all_cfgs() -> dict[str, dict[str, Any] | PretrainedCfg]:
    """What timm keeps by name and tag; the first of a model that has weights is its default."""
    configs: dict[str, dict[str, Any] | PretrainedCfg] = {}
    for name in (f'vit_{size}_{method}' for size in SIZES for method in METHODS):
        if HUB_NAME is not None:
            tagged = f'{name}.{TAG}'
            configs[tagged] = {**_cfg(), **_TRAINED, 'hf_hub_id': f'{HUB_NAME}/{tagged}'}
        configs[f'{name}.untrained'] = _cfg()
    return configs


default_cfgs = generate_default_cfgs(_all_cfgs())


def _create(size: str, method: str, pretrained: bool, **kwargs: Any) -> MoeVisionTransformer:
    return build(f'vit_{size}_{method}', method, SIZES[size], pretrained, **kwargs)


@register_model
def vit_tiny_vqmoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-Ti/16 with VQMoE layers."""
    return _create('tiny', 'vqmoe', pretrained, **kwargs)


@register_model
def vit_small_vqmoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-S/16 with VQMoE layers."""
    return _create('small', 'vqmoe', pretrained, **kwargs)


@register_model
def vit_base_vqmoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-B/16 with VQMoE layers."""
    return _create('base', 'vqmoe', pretrained, **kwargs)


@register_model
def vit_large_vqmoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-L/16 with VQMoE layers."""
    return _create('large', 'vqmoe', pretrained, **kwargs)


@register_model
def vit_tiny_softmoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-Ti/16 with SoftMoE layers."""
    return _create('tiny', 'softmoe', pretrained, **kwargs)


@register_model
def vit_small_softmoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-S/16 with SoftMoE layers."""
    return _create('small', 'softmoe', pretrained, **kwargs)


@register_model
def vit_base_softmoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-B/16 with SoftMoE layers."""
    return _create('base', 'softmoe', pretrained, **kwargs)


@register_model
def vit_large_softmoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-L/16 with SoftMoE layers."""
    return _create('large', 'softmoe', pretrained, **kwargs)


@register_model
def vit_tiny_smoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-Ti/16 with SMoE layers."""
    return _create('tiny', 'smoe', pretrained, **kwargs)


@register_model
def vit_small_smoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-S/16 with SMoE layers."""
    return _create('small', 'smoe', pretrained, **kwargs)


@register_model
def vit_base_smoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-B/16 with SMoE layers."""
    return _create('base', 'smoe', pretrained, **kwargs)


@register_model
def vit_large_smoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-L/16 with SMoE layers."""
    return _create('large', 'smoe', pretrained, **kwargs)


@register_model
def vit_tiny_stablemoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-Ti/16 with StableMoE layers."""
    return _create('tiny', 'stablemoe', pretrained, **kwargs)


@register_model
def vit_small_stablemoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-S/16 with StableMoE layers."""
    return _create('small', 'stablemoe', pretrained, **kwargs)


@register_model
def vit_base_stablemoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-B/16 with StableMoE layers."""
    return _create('base', 'stablemoe', pretrained, **kwargs)


@register_model
def vit_large_stablemoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-L/16 with StableMoE layers."""
    return _create('large', 'stablemoe', pretrained, **kwargs)


@register_model
def vit_tiny_xmoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-Ti/16 with XMoE layers."""
    return _create('tiny', 'xmoe', pretrained, **kwargs)


@register_model
def vit_small_xmoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-S/16 with XMoE layers."""
    return _create('small', 'xmoe', pretrained, **kwargs)


@register_model
def vit_base_xmoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-B/16 with XMoE layers."""
    return _create('base', 'xmoe', pretrained, **kwargs)


@register_model
def vit_large_xmoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-L/16 with XMoE layers."""
    return _create('large', 'xmoe', pretrained, **kwargs)


@register_model
def vit_tiny_ecmoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-Ti/16 with expert choice layers."""
    return _create('tiny', 'ecmoe', pretrained, **kwargs)


@register_model
def vit_small_ecmoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-S/16 with expert choice layers."""
    return _create('small', 'ecmoe', pretrained, **kwargs)


@register_model
def vit_base_ecmoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-B/16 with expert choice layers."""
    return _create('base', 'ecmoe', pretrained, **kwargs)


@register_model
def vit_large_ecmoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-L/16 with expert choice layers."""
    return _create('large', 'ecmoe', pretrained, **kwargs)


@register_model
def vit_tiny_hashmoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-Ti/16 with hash layers."""
    return _create('tiny', 'hashmoe', pretrained, **kwargs)


@register_model
def vit_small_hashmoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-S/16 with hash layers."""
    return _create('small', 'hashmoe', pretrained, **kwargs)


@register_model
def vit_base_hashmoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-B/16 with hash layers."""
    return _create('base', 'hashmoe', pretrained, **kwargs)


@register_model
def vit_large_hashmoe(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-L/16 with hash layers."""
    return _create('large', 'hashmoe', pretrained, **kwargs)


@register_model
def vit_tiny_mocle(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-Ti/16 with MoCLE layers."""
    return _create('tiny', 'mocle', pretrained, **kwargs)


@register_model
def vit_small_mocle(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-S/16 with MoCLE layers."""
    return _create('small', 'mocle', pretrained, **kwargs)


@register_model
def vit_base_mocle(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-B/16 with MoCLE layers."""
    return _create('base', 'mocle', pretrained, **kwargs)


@register_model
def vit_large_mocle(pretrained: bool = False, **kwargs: Any) -> MoeVisionTransformer:
    """ViT-L/16 with MoCLE layers."""
    return _create('large', 'mocle', pretrained, **kwargs)
