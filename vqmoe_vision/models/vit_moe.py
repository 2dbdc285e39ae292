"""Vision transformers whose blocks hold mixture-of-experts layers, registered with timm.

`timm.create_model('vit_small_vqmoe', num_experts=16, moe_layers='last2')`: every argument of
timm's `VisionTransformer` and every option of the method's configuration dataclass is a keyword.

Only `blocks[i].mlp` differs from timm's ViT of the same size.
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model

from ..moe.methods import METHODS
from .build import build
from .moe_vit import MoeVisionTransformer

__all__ = ['SIZES']  # register_model adds each entry point


_CFG = {
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
SIZES: dict[str, dict[str, int]] = {
    'tiny': {'patch_size': 16, 'embed_dim': 192, 'depth': 12, 'num_heads': 3},
    'small': {'patch_size': 16, 'embed_dim': 384, 'depth': 12, 'num_heads': 6},
    'base': {'patch_size': 16, 'embed_dim': 768, 'depth': 12, 'num_heads': 12},
    'large': {'patch_size': 16, 'embed_dim': 1024, 'depth': 24, 'num_heads': 16},
}


default_cfgs = generate_default_cfgs(
    {f'vit_{size}_{method}.untrained': {**_CFG} for size in SIZES for method in METHODS}
)


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
