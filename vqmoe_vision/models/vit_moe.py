"""Vision transformers whose blocks hold mixture-of-experts layers, registered with timm.

`timm.create_model('vit_small_vqmoe', num_experts=16, moe_layers='last2')`: every argument of
timm's `VisionTransformer` and every option of the method's configuration dataclass is a keyword.

Only `blocks[i].mlp` differs from timm's ViT of the same size.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from inspect import signature
from os import PathLike
from pathlib import Path
from typing import Any

from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    generate_default_cfgs,
    get_arch_name,
    get_pretrained_cfg,
    register_model,
)
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn

from ..moe.config import check, did_you_mean
from ..moe.methods import METHODS
from .layers import moe_options
from .moe_vit import MoeVisionTransformer
from .normalization import check_normalization, stated_normalization
from .upcycle import read_upcycling, refuse_unused
from .weights import (
    CONFIG,
    Described,
    checked_arguments,
    load_weights,
    of_one_place,
    overlay_for,
    place_of,
    source_of,
)

__all__ = ['SIZES']  # register_model adds each entry point

_CFG: dict = {
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
SIZES = {
    'tiny': {'patch_size': 16, 'embed_dim': 192, 'depth': 12, 'num_heads': 3},
    'small': {'patch_size': 16, 'embed_dim': 384, 'depth': 12, 'num_heads': 6},
    'base': {'patch_size': 16, 'embed_dim': 768, 'depth': 12, 'num_heads': 12},
    'large': {'patch_size': 16, 'embed_dim': 1024, 'depth': 24, 'num_heads': 16},
}
# Two small models of CIFAR-10's classes at 32 pixels, as timm has its `test_vit`. Their weights
# come with the package, in `weights`, whose README.md is their model card.
CIFAR10_CLASSES = (
    *('airplane', 'automobile', 'bird', 'cat', 'deer'),
    *('dog', 'frog', 'horse', 'ship', 'truck'),
)
_TEST = {
    'img_size': 32,
    'patch_size': 4,
    'embed_dim': 96,
    'depth': 5,
    'num_heads': 3,
    'mlp_ratio': 3.0,
    'class_token': False,
    'global_pool': 'avg',
}
DENSE = 'test_vit_dense'


def _cifar10(name: str) -> dict:
    return {
        **{key: value for key, value in _CFG.items() if key != 'url'},
        'file': str(Path(__file__).parent / f'weights/{name}.safetensors'),
        'license': 'apache-2.0',
        'num_classes': len(CIFAR10_CLASSES),
        'label_names': CIFAR10_CLASSES,
        'input_size': (3, 32, 32),
        'crop_pct': 1.0,
        'interpolation': 'bilinear',
        'mean': (0.4914, 0.4822, 0.4465),
        'std': (0.2023, 0.1994, 0.2010),
    }


default_cfgs = generate_default_cfgs(
    {
        **{f'vit_{size}_{method}.untrained': {**_CFG} for size in SIZES for method in METHODS},
        **{f'{name}.cifar10': _cifar10(name) for name in ('test_vit_vqmoe', DENSE)},
    }
)


def _entry_point(name: str, method: str, sizes: dict) -> None:
    """Registers a function with timm, which knows them by their names."""

    def create(pretrained: bool = False, **kwargs: Any) -> Any:
        given = {**sizes, **kwargs}
        if kwargs.get('pretrained_model_args'):  # they say the preset, and not the name
            given |= {'preset': kwargs.get('preset')}
        return build(MoeVisionTransformer, name, method, pretrained, **given)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f'A vision transformer with layers of {method}, of {sizes}.'
    globals()[name] = register_model(create)


for _method in METHODS:
    for _size, _sizes in SIZES.items():
        _entry_point(f'vit_{_size}_{_method}', _method, _sizes)
_OF_WEIGHTS = {'preset': 'ema', 'num_experts': 4, 'moe_layers': (2, 4)}
_entry_point('test_vit_vqmoe', 'vqmoe', {**_TEST, **_OF_WEIGHTS})


@register_model
def test_vit_dense(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """The dense ViT of the same size, to upcycle from."""
    return build_model_with_cfg(
        VisionTransformer,
        DENSE,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={'out_indices': kwargs.pop('out_indices', 3), 'feature_cls': 'getter'},
        **{**_TEST, **kwargs},
    )


def build(
    make: Callable[..., nn.Module],
    name: str,
    method: str,
    pretrained: bool,
    upcycle: str | PathLike[str] | None = None,
    known_as: str = '',
    **kwargs: Any,
) -> Any:
    """A model with experts of any class, and its weights, which timm may know by another name."""
    check(isinstance(pretrained, bool), 'pretrained', pretrained, 'True or False')
    saved = kwargs.get('pretrained_model_args') or {}  # what config.json says, since timm 1.0.31
    allowed = checked_arguments(saved, f'{CONFIG} of {name}')
    # timm adds what the file says to the arguments of the call
    refused = {k: v for k, v in saved.items() if k not in allowed}
    upcycle = None if upcycle == refused.get('upcycle') else upcycle
    kwargs = {k: v for k, v in kwargs.items() if k not in refused or v != refused[k]}
    check(not (pretrained and upcycle), 'pretrained', True, f'False with upcycle={upcycle!r}')
    if saved:
        # without those of saved weights that the other options leave without effect
        kind = METHODS[method].config
        if kwargs.get('preset') == saved.get('preset'):
            kwargs['preset'] = kind.former_preset(saved)
        else:  # the call names another one
            names = kind.option_names() & saved.keys()
            kwargs = {k: v for k, v in kwargs.items() if k not in names or v != saved[k]}
        options = {k: v for k, v in kwargs.items() if k in kind.option_names()}
        past = {'upcycling', *kind.of_preset(**options).unused()}
        kwargs = {
            k: v for k, v in kwargs.items() if k not in past or k not in saved or saved[k] != v
        }
    starts = pretrained or upcycle is not None
    if not starts and kwargs.get('upcycling') is not None:
        ways = 'pretrained=True' if known_as else 'upcycle=SOURCE or pretrained=True'
        refuse_unused(read_upcycling(kwargs['upcycling']), ways)
    depth = kwargs.get('depth', 3)
    # of `features_only`: the last three blocks, or all of a shallower model
    out_indices = kwargs.pop('out_indices', min(3, depth) if type(depth) is int else 3)
    if starts or kwargs.get('pretrained_cfg') or kwargs.get('pretrained_cfg_overlay') or known_as:
        source = Source(known_as or name, kwargs, saved_as=name if saved else '')
        overlay, cache_dir = source.overlay, kwargs.get('cache_dir')
        if starts:
            overlay, described = overlay_for(upcycle, source.config, overlay, source.own, cache_dir)
        if known_as and source.name:
            exists = not pretrained or bool(source_of({**source.config, **overlay}))
            check(exists, 'pretrained', True, f'False, timm has no weights of {known_as}')
            kwargs['pretrained_cfg'] = replace(source.known, architecture=name, custom_load=False)
        kwargs['pretrained_cfg_overlay'] = overlay
    features = {'out_indices': out_indices, 'feature_cls': 'getter'}
    try:
        model: Any = build_model_with_cfg(
            make, name, False, feature_cfg=features, method=method, **kwargs
        )
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is None or unknown[1] not in kwargs:
            raise
        raise TypeError(f'{name}: {_of_unknown(unknown[1], method)}') from error
    if starts:
        whole = model.model if kwargs.get('features_only') else model
        load_weights(whole, described, cache_dir, source.follow)
        model.pretrained_cfg.update({k: whole.pretrained_cfg[k] for k in ('mean', 'std')})
    return model


def _of_unknown(argument: str, method: str) -> str:
    """What to say of an argument that neither a method nor timm's model has."""
    known = moe_options(method) | {*signature(VisionTransformer).parameters}
    others = [name for name in METHODS if argument in moe_options(name)]
    of_others = f', which {", ".join(others)} have' if others else ''
    options = ', '.join(sorted(moe_options(method)))
    return (
        f'unexpected keyword argument {argument!r}{of_others}; the options of {method} are '
        f'{options}{did_you_mean(argument, known)}'
    )


class Source:
    """What a call states of weights, and what timm knows by the name of a model."""

    def __init__(self, name: str, kwargs: dict, saved_as: str = '') -> None:
        stated = kwargs.get('pretrained_cfg')
        stated = stated.to_dict() if isinstance(stated, PretrainedCfg) else stated or ''
        check(isinstance(stated, str | dict), 'pretrained_cfg', stated, 'a dictionary, or a tag')
        overlay = kwargs.get('pretrained_cfg_overlay') or {}
        check(isinstance(overlay, dict), 'pretrained_cfg_overlay', overlay, 'a dictionary')
        channels = kwargs.get('in_chans')
        channels = channels if type(channels) is int and channels > 0 else 3  # the model says it
        numbers = stated_normalization(overlay, 'pretrained_cfg_overlay.', channels=channels)
        self.overlay = overlay if numbers is None else {**overlay, **vars(numbers)}
        self.name, self.config = '', {} if isinstance(stated, str) else of_one_place(stated)
        if isinstance(stated, dict):
            check_normalization(stated, 'pretrained_cfg.')
        else:
            self.name = f'{get_arch_name(name)}.{stated}' if stated else name
            self.known = get_pretrained_cfg(self.name) or PretrainedCfg()
            self.config = place_of(self.known.to_dict())
        self.own = Described.of({}, self.name or saved_as, kwargs.get('pretrained_model_args'))
        # numbers that the call states are before those of a run
        self.follow = not {'mean', 'std'} & {*overlay, *self.config}
