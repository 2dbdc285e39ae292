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
from .build import build
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


def _entry_point(size: str, method: str) -> None:
    """Registers a function with timm, which knows them by their names."""
    name = f'vit_{size}_{method}'

    def create(pretrained: bool = False, **kwargs: Any) -> Any:
        return build(MoeVisionTransformer, name, method, pretrained, **{**SIZES[size], **kwargs})

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f'ViT-{size.capitalize()}/16 with layers of {method}.'
    globals()[name] = register_model(create)


for _method in METHODS:
    for _size in SIZES:
        _entry_point(_size, _method)
