"""Vision transformers whose blocks hold mixture-of-experts layers, registered with timm.

`timm.create_model('vit_small_vqmoe', num_experts=16, moe_layers='last2')`: every argument of
timm's `VisionTransformer` and every option of the method's configuration dataclass is a keyword.

Only `blocks[i].mlp` differs from timm's ViT of the same size; the blocks, the stem, the head and
their names are timm's, so weights of dense models fit everywhere else.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    generate_default_cfgs,
    list_models,
    register_model,
)

from ..moe.config import check
from ..moe.methods import METHODS
from .sources import HUB_NAME, fit_pretrained, named_source, source_of, upcycle_overlay
from .sparse_model import MoeVisionTransformer

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


def _create(
    size: str, method: str, pretrained: bool, upcycle: str | None = None, **kwargs: Any
) -> MoeVisionTransformer:
    """A model as timm builds it.

    Args:
        size: Key of `SIZES`.
        method: Key of `METHODS`.
        pretrained: Whether to load weights, which `pretrained_cfg_overlay` has to name.
        upcycle: What to start from instead, see `upcycle_overlay`.
        **kwargs: Of `MoeVisionTransformer` and of `build_model_with_cfg`.

    Raises:
        ValueError: An argument is impossible, or the weights cannot be read or do not fit.
    """
    _check_sources(f'vit_{size}_{method}', pretrained, kwargs)
    depth = kwargs.get('depth', SIZES[size]['depth'])
    # of `features_only`: the last three blocks, or all of a shallower model
    out_indices = kwargs.pop('out_indices', min(3, depth) if type(depth) is int else 3)
    overlay = kwargs.pop('pretrained_cfg_overlay', None) or {}
    if upcycle is not None:
        check(not pretrained, 'pretrained', True, f'False with upcycle={upcycle!r}')
        pretrained, overlay = True, {**upcycle_overlay(upcycle, kwargs.get('cache_dir')), **overlay}
    config = kwargs.get('pretrained_cfg')
    source = source_of({**(config if isinstance(config, dict) else {}), **overlay})
    with named_source(source) if pretrained and source else nullcontext():
        return build_model_with_cfg(
            MoeVisionTransformer,
            f'vit_{size}_{method}',
            pretrained,
            pretrained_cfg_overlay=overlay,
            pretrained_filter_fn=fit_pretrained,
            feature_cfg={'out_indices': out_indices, 'feature_cls': 'getter'},
            method=method,
            **{**SIZES[size], **kwargs},
        )


def _check_sources(name: str, pretrained: Any, kwargs: dict[str, Any]) -> None:
    """Refuses what cannot say which weights a model begins with; timm fails in other ways."""
    check(isinstance(pretrained, bool), 'pretrained', pretrained, 'True or False')
    config, overlay = kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay')
    if isinstance(config, str) and config:
        tags = [model.partition('.')[2] for model in list_models(f'{name}.*', include_tags=True)]
        check(config in tags, 'pretrained_cfg', config, f'a dictionary, or a tag of {tags}')
    kinds = str | dict | PretrainedCfg | None
    check(isinstance(config, kinds), 'pretrained_cfg', config, 'a dictionary, or a tag')
    fits = overlay is None or isinstance(overlay, dict)
    check(fits, 'pretrained_cfg_overlay', overlay, 'a dictionary')


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
