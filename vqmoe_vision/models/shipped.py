"""Two small models of CIFAR-10's ten classes at 32 pixels, as timm has its `test_vit`.

Their weights come with the package, in `weights`, whose README.md is their model card.
"""

from pathlib import Path
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from .build import build
from .moe_vit import MoeVisionTransformer

__all__: list[str] = []  # register_model adds each entry point

CIFAR10_CLASSES = (
    'airplane',
    'automobile',
    'bird',
    'cat',
    'deer',
    'dog',
    'frog',
    'horse',
    'ship',
    'truck',
)
_SIZE: dict[str, Any] = {
    'img_size': 32,
    'patch_size': 4,
    'embed_dim': 96,
    'depth': 5,
    'num_heads': 3,
    'mlp_ratio': 3.0,
    'class_token': False,
    'global_pool': 'avg',
}


def _cfg(name: str) -> dict[str, Any]:
    return {
        'file': str(Path(__file__).parent / f'weights/{name}.safetensors'),
        'license': 'apache-2.0',
        'num_classes': len(CIFAR10_CLASSES),
        'label_names': CIFAR10_CLASSES,
        'input_size': (3, 32, 32),
        'pool_size': None,
        'crop_pct': 1.0,
        'interpolation': 'bilinear',
        'fixed_input_size': True,
        'mean': (0.4914, 0.4822, 0.4465),
        'std': (0.2023, 0.1994, 0.2010),
        'first_conv': 'patch_embed.proj',
        'classifier': 'head',
    }


# Of the shape of the others, without experts.
DENSE = 'test_vit_dense'
_NAMES = ('test_vit_vqmoe', DENSE)
default_cfgs = generate_default_cfgs({f'{name}.cifar10': _cfg(name) for name in _NAMES})


@register_model
def test_vit_vqmoe(pretrained: bool = False, **kwargs: Any) -> Any:
    """A small VQMoE for tests: four experts in blocks 2 and 4."""
    given = {**_SIZE, 'num_experts': 4, 'moe_layers': (2, 4), **kwargs}
    return build(MoeVisionTransformer, 'test_vit_vqmoe', 'vqmoe', pretrained, **given)


@register_model
def test_vit_dense(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """The dense ViT of the same size, to upcycle from."""
    return build_model_with_cfg(
        VisionTransformer,
        DENSE,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={'out_indices': kwargs.pop('out_indices', 3), 'feature_cls': 'getter'},
        **{**_SIZE, **kwargs},
    )
