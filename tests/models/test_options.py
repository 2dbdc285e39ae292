"""Whatever options are given: a model that works, or one line that names the option."""

import re
from typing import Any, get_args, get_type_hints

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers.create_act import _ACT_LAYER_DEFAULT
from timm.models.vision_transformer import ATTN_LAYERS, VisionTransformer
from torch import nn

import vqmoe_vision.models  # noqa: F401  registers the models
from vqmoe_vision import collect_losses
from vqmoe_vision.models.create import create_model
from vqmoe_vision.moe import METHODS

DENSE = 'vit_tiny_patch16_224'
SMALL = dict(img_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=2, num_classes=3)
# mostly what works, so that a draw of several options has a chance to
BY_TYPE: dict[Any, list[Any]] = {
    int: [1, 2, 4, 1, 2, 4, 3, 8, 0, -1, 2.5, True],
    float: [0.0, 0.1, 0.5, 1, 0.25, 2.0, 1e-5, -0.1, float('nan'), float('inf'), 'x'],
    bool: [True, False, True, False, 'yes'],
    str: ['', 'foo', 'none', 'learn', 'full', 'mix', 'simvq', 'l2', 1],
}
MEAN = {'mean': (0.1,) * 3}
BY_NAME: dict[str, list[Any]] = {
    'img_size': [8, 12, (8, 12), [12, 8], 4, 8, 9, 0, '8', (8,), 3],
    'patch_size': [4, 2, (4, 2), 4, 3, 0, 16],
    'num_classes': [0, 1, 5, 7, 1000, -1, 2.5],
    'dtype': [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32, 'half'],
    'device': ['cpu', torch.device('cpu'), 'cpux'],
    'act_layer': [*_ACT_LAYER_DEFAULT, 'foo', nn.Tanh],
    # others normalise images, and fail or refuse tokens
    'norm_layer': ['layernorm', 'rmsnorm', 'simplenorm', 'foo', nn.LayerNorm],
    'embed_norm_layer': ['layernorm', 'rmsnorm', 'simplenorm', 'foo', nn.LayerNorm],
    'attn_layer': [*ATTN_LAYERS, 'foo'],
    'pos_embed': ['', 'none', 'learn', 'rope'],
    'moe_layers': ['every1', 'every2', 'last1', [0], [1, 0], 'every9', [5], 'none'],
    'preset': ['paper', 'matched', 'foo'],
    'foo': [1],
    # of `timm.create_model` itself, for our models
    'pretrained': [False, 'x', 5, None],
    'pretrained_cfg': [None, '', 'untrained', {}, 'x', 5],
    'pretrained_cfg_overlay': [None, {}, MEAN, {**MEAN, 'std': (0.4,) * 3}, 'x', 5],
}
OF_CREATE = {name: None for name in ('pretrained', 'pretrained_cfg', 'pretrained_cfg_overlay')}
TIMM = {
    name: hint
    for name, hint in get_type_hints(VisionTransformer.__init__).items()
    # classes are the user's own code
    if name not in ('return', 'embed_layer', 'block_fn', 'mlp_layer')
}


def values(name: str, hint: Any) -> list[Any]:
    if name in BY_NAME:
        return BY_NAME[name]
    if hint in BY_TYPE:
        return BY_TYPE[hint]
    inner = [value for part in get_args(hint) for value in BY_TYPE.get(part, [part])]
    return [*inner, 'foo'] if inner else [None]


@st.composite
def options(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    method = draw(st.sampled_from([None, *METHODS]))
    hints = dict.fromkeys(['dtype', 'device', 'foo']) | TIMM
    if method is not None:
        config = METHODS[method].config
        own = {'moe_layers': None, 'preset': None, **get_type_hints(config)}
        own = {name: own[name] for name in sorted({'moe_layers', *config.option_names()})}
        hints |= own | OF_CREATE
        names = draw(st.lists(st.sampled_from(sorted(own)), max_size=2, unique=True))
    else:
        names = []
    names += draw(st.lists(st.sampled_from(sorted(hints)), max_size=4, unique=True))
    chosen = {name: draw(st.sampled_from(values(name, hints[name]))) for name in names}
    return (f'vit_tiny_{method}' if method else DENSE), {**SMALL, **chosen}


def check_model(model: Any, given: dict[str, Any], batch: int) -> None:
    """Outputs of the right shape, and losses and gradients, all finite."""
    dtype = model.head.weight.dtype if given['num_classes'] else model.patch_embed.proj.weight.dtype
    assert given.get('dtype') in (None, dtype)
    height, width = model.patch_embed.img_size
    images = torch.randn(batch, given.get('in_chans', 3), height, width, dtype=dtype)
    if given.get('dynamic_img_size'):
        images = torch.cat([images, images], dim=-1)
    features = given['num_classes'] or given['embed_dim']
    if given.get('global_pool', 'token') == '':
        down, right = model.patch_embed.dynamic_feat_size(images.shape[-2:])
        shape: tuple[int, ...] = (batch, down * right + model.num_prefix_tokens, features)
    else:
        shape = (batch, features)
    with torch.inference_mode():
        output = model.eval()(images)
    assert output.shape == shape
    assert output.isfinite().all()
    with collect_losses(model.train()) as collected:
        (model(images).float().mean() + collected.total()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


def check_options(name: str, given: dict[str, Any], batch: int, direct: bool) -> bool:
    create = timm.create_model if direct and name != DENSE else create_model
    try:
        model = create(name, **given)
    except Exception as error:  # what timm and torch know they say in their own words
        if 'is not possible' in str(error):
            words = re.findall(r'\w+', str(error))
            assert given.keys() & set(words), f'{error} names no option of {given}'
            assert '\n' not in str(error)
        return False
    check_model(model, given, batch)
    return True


DRAWS = (options(), st.integers(1, 3), st.booleans())


@settings(max_examples=200)
@given(*DRAWS)
def test_options(named, batch, direct):
    check_options(*named, batch, direct)


@pytest.mark.parametrize('method', METHODS)
def test_features_of_a_shallow_model(method):
    model = timm.create_model(f'vit_tiny_{method}', features_only=True, **SMALL).eval()
    maps = model(torch.randn(1, 3, 8, 8))
    assert [tuple(each.shape) for each in maps] == [(1, 8, 2, 2)] * 2
