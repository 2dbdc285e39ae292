"""Names, sizes, options and their mistakes."""

import math
import re
from dataclasses import fields
from typing import Any

import pytest
import timm
import torch
from timm.layers import SwiGLU
from timm.models.vision_transformer import Block, ParallelScalingBlock
from torch import nn

from vqmoe_vision.models import MoeVisionTransformer, convert_to_moe
from vqmoe_vision.models.moe_vit import resolve_moe_layers
from vqmoe_vision.models.vit_moe import SIZES
from vqmoe_vision.moe import METHODS, MoeLayer

from ..variants import trials
from .conftest import DENSE, TINY

NAMES = timm.list_models(module='vit_moe')

IMPOSSIBLE = [
    ('smoe', {'num_experts': 0}, 'num_experts=0', 'at least 1'),
    ('smoe', {'num_experts': 2, 'top_k': 3}, 'top_k=3', 'between 1 and num_experts=2'),
    ('xmoe', {'num_experts': 1, 'top_k': 2}, 'top_k=2', 'between 1 and num_experts=1'),
    ('stablemoe', {'top_k': 0}, 'top_k=0', 'between 1 and num_experts=8'),
    ('smoe', {'expert_mlp_ratio': 0}, 'expert_mlp_ratio=0', 'above 0'),
    (
        'smoe',
        {'preset': 'nonsense'},
        "preset='nonsense'",
        "['frozen', 'group', 'matched', 'paper']",
    ),
    ('smoe', {'renormalize': True, 'top_k': 1}, 'renormalize=True', 'False when top_k=1'),
    ('smoe', {'router_noise': 0.0}, 'load_weight=0.005', '0 when router_noise=0'),
    ('smoe', {'z_weight': -1.0}, 'z_weight=-1.0', 'at least 0'),
    ('smoe', {'capacity_factor': 0.0}, 'capacity_factor=0.0', 'None for dropless'),
    ('smoe', {'eval_capacity_factor': math.inf}, 'eval_capacity_factor=inf', 'finite'),
    ('smoe', {'batch_prioritized': True}, 'batch_prioritized=True', 'capacity_factor is set'),
    ('xmoe', {'gate': 'tanh'}, "gate='tanh'", "['sigmoid', 'softmax']"),
    ('xmoe', {'router_dim': 1}, 'router_dim=1', 'at least 2'),
    ('xmoe', {'temperature': 0.0}, 'temperature=0.0', 'above 0'),
    ('stablemoe', {'stage1_steps': 0}, 'stage1_steps=0', 'at least 1'),
    ('stablemoe', {'two_stage': False}, 'top_k=1', 'at least 2'),
    ('stablemoe', {'patch_drop_rate': 0.1}, 'patch_drop_rate=0.1', '0, as stablemoe needs all'),
    ('stablemoe', {'block_fn': Block}, 'block_fn=', 'not set'),
    ('stablemoe', {'embed_layer': nn.Identity}, 'embed_layer=', 'not set'),
    ('softmoe', {'slots_per_expert': 0}, 'slots_per_expert=0', 'at least 1'),
    ('softmoe', {'slot_norm': 'l1'}, "slot_norm='l1'", "'l2' or 'rms'"),
    ('vqmoe', {'form': 'both'}, "form='both'", "('full', 'discrete', 'continuous')"),
    ('vqmoe', {'codebook': 'fsq'}, "codebook='fsq'", "'ema'"),
    ('vqmoe', {'num_codes': 12}, 'num_codes=12', 'multiple of num_experts=8'),
    ('vqmoe', {'num_codes': 4}, 'num_codes=4', 'multiple of num_experts=8'),
    ('vqmoe', {'code_share': 1.5}, 'code_share=1.5', 'between 0 and 1'),
    ('vqmoe', {'expert_input': 'x'}, "expert_input='x'", "'mix'"),
    ('vqmoe', {'train_router': False}, 'balance_weight=0.01', '0 with train_router=False'),
    ('vqmoe', {'img_size': 33}, 'img_size=33', 'a multiple of patch_size=8x8'),
    (
        'vqmoe',
        {'img_size': 33, 'dynamic_img_pad': True},
        'img_size=33',
        'both dynamic_img_size=True and dynamic_img_pad=True',
    ),
    ('vqmoe', {'img_size': (32, 36)}, 'img_size=(32, 36)', 'a multiple of patch_size=8x8'),
    ('vqmoe', {'weight_init': 'skip'}, "weight_init='skip'", 'uninitialised'),
    ('vqmoe', {'weight_init': 'xavier'}, "weight_init='xavier'", "'moco'"),
    ('vqmoe', {'patch_drop_rate': 1.0}, 'patch_drop_rate=1.0', 'from 0 to 1'),
    ('vqmoe', {'drop_path_rate': 2}, 'drop_path_rate=2', 'from 0 to 1'),
    ('vqmoe', {'global_pool': 'mean'}, "global_pool='mean'", "'avg'"),
    ('vqmoe', {'reg_tokens': -1}, 'reg_tokens=-1', 'at least 0'),
    ('vqmoe', {'in_chans': 0}, 'in_chans=0', 'at least 1'),
    ('vqmoe', {'num_classes': 2.5}, 'num_classes=2.5', 'int is expected'),
    ('vqmoe', {'qkv_bias': 'no'}, "qkv_bias='no'", 'bool is expected'),
    ('vqmoe', {'mlp_ratio': 0.01}, 'mlp_ratio=0.01', 'one hidden feature'),
    ('vqmoe', {'scale_mlp_norm': True}, 'scale_mlp_norm=True', 'False'),
    ('smoe', {'mlp_layer': SwiGLU}, 'mlp_layer=', 'Mlp'),
    ('vqmoe', {'block_fn': ParallelScalingBlock}, 'block_fn=', 'mlp'),
    ('vqmoe', {'moe_layers': 'every0'}, "moe_layers='every0'", "'everyN'"),
    ('vqmoe', {'moe_layers': 'every5'}, "moe_layers='every5'", 'depth=4'),
    ('vqmoe', {'moe_layers': 'last3'}, "moe_layers='last3'", 'depth=4'),
    ('vqmoe', {'moe_layers': 'first2'}, "moe_layers='first2'", "'lastN'"),
    ('vqmoe', {'moe_layers': [4]}, 'moe_layers=[4]', 'blocks of depth=4'),
    ('vqmoe', {'moe_layers': [-1]}, 'moe_layers=[-1]', 'blocks of depth=4'),
    ('vqmoe', {'moe_layers': []}, 'moe_layers=[]', 'blocks of depth=4'),
    ('vqmoe', {'moe_layers': 1}, 'moe_layers=1', 'block indices'),
]


def moe_blocks(model: nn.Module) -> list[int]:
    return [i for i, block in enumerate(model.blocks) if isinstance(block.mlp, MoeLayer)]


def test_every_method_has_a_name_in_every_size() -> None:
    assert set(NAMES) == {f'vit_{size}_{method}' for size in SIZES for method in METHODS}


@pytest.mark.parametrize('name', NAMES)
def test_default_size_and_placement(name: str) -> None:
    _, size, method = name.split('_')
    with torch.device('meta'):
        model: Any = timm.create_model(name)
        dense: Any = timm.create_model(f'vit_{size}_patch16_224')

    assert isinstance(model, MoeVisionTransformer)
    assert (model.method, model.num_classes) == (method, 1000)
    assert model.patch_embed.img_size == (224, 224)
    assert moe_blocks(model) == list(range(len(dense.blocks)))[1::2]
    experts = model.blocks[1].mlp.experts
    hidden, width = dense.blocks[1].mlp.fc1.weight.shape
    assert experts.fc1.weight.shape == (8, hidden, width)
    assert experts.fc2.weight.shape == (8, width, hidden)
    # nothing but the MLPs, and what reads the image for them, differs from timm's model of the size
    others = {k: v.shape for k, v in dense.state_dict().items() if '.mlp.' not in k}
    own = {k: v.shape for k, v in model.state_dict().items() if '.mlp.' not in k}
    assert {k: v for k, v in own.items() if not k.startswith('patch_embed.reader.')} == others


@pytest.mark.parametrize(
    ('layers', 'depth', 'expected'),
    [
        ('every2', 5, (1, 3)),
        ('every2', 6, (1, 3, 5)),
        ('every1', 3, (0, 1, 2)),
        ('every3', 7, (2, 5)),
        ('last2', 12, (9, 11)),  # V-MoE's Last 2 of a B/16
        ('last1', 4, (3,)),
        ([2, 0, 2], 3, (0, 2)),
        ((1,), 3, (1,)),
        (range(2), 4, (0, 1)),
    ],
)
def test_which_blocks_are_moe(layers: object, depth: int, expected: tuple[int, ...]) -> None:
    assert resolve_moe_layers(layers, depth) == expected


def test_placement_reaches_the_model(tiny) -> None:
    assert moe_blocks(tiny(moe_layers=[0, 2])) == [0, 2]


@pytest.mark.parametrize('method', METHODS)
def test_every_option_is_tried_with_another_value_than_its_default(method: str) -> None:
    config = METHODS[method].config
    shared = {'num_experts', 'expert_mlp_ratio'}  # of every method, and tried below
    tried = [config.from_options(preset) for preset in config.PRESETS]
    tried += [config.from_options(**options) for options in trials(config).values()]
    for field in fields(config):
        values = [getattr(each, field.name) for each in tried]
        assert field.name in shared or any(value != field.default for value in values), field.name


def test_options_reach_the_layers(tiny_variant, images) -> None:
    model = tiny_variant(depth=2, num_experts=4, expert_mlp_ratio=2.0)
    assert model.eval()(images).isfinite().all()
    layer = model.blocks[1].mlp
    assert layer.experts.fc1.weight.shape == (4, 64, 32)


@pytest.mark.parametrize(
    'method', [name for name, method in METHODS.items() for _ in method.config.PRESETS]
)
def test_an_option_wins_over_its_preset(make_tiny, method: str) -> None:
    for preset, values in METHODS[method].config.PRESETS.items():
        config = make_tiny(method, depth=2, preset=preset, num_experts=4).moe_config
        assert config.num_experts == 4
        assert values == {name: getattr(config, name) for name in values}


def test_options_of_the_vit_reach_the_experts(tiny) -> None:
    model = tiny(mlp_ratio=2.0, act_layer='relu', proj_bias=False, proj_drop_rate=0.3)
    experts = model.blocks[1].mlp.experts
    assert experts.fc1.weight.shape[1] == 64
    assert isinstance(experts.act, nn.ReLU)
    assert experts.fc1.bias is None and experts.fc2.bias is None
    assert experts.drop1.p == experts.drop2.p == 0.3


def test_experts_may_be_narrower_than_the_dense_mlp(tiny) -> None:
    model = tiny(mlp_ratio=4.0, expert_mlp_ratio=1.0)
    assert model.blocks[0].mlp.fc1.weight.shape[0] == 128
    assert model.blocks[1].mlp.experts.fc1.weight.shape[1] == 32


def test_an_unknown_keyword_is_a_type_error(tiny) -> None:
    with pytest.raises(TypeError, match=r"'num_expert'.*num_experts"):
        tiny(num_expert=4)


def test_an_option_of_another_method_is_a_type_error(method: str, tiny) -> None:
    options = {name for other in METHODS.values() for name in other.config.option_names()}
    foreign = options - METHODS[method].config.option_names()
    assert foreign
    for option in foreign:
        with pytest.raises(TypeError, match=f"'{option}'"):
            tiny(device='meta', **{option: 1})


@pytest.mark.parametrize(('method', 'options', 'found', 'allowed'), IMPOSSIBLE)
def test_an_impossible_value_names_field_value_and_what_is_allowed(
    make_tiny, method: str, options: dict, found: str, allowed: str
) -> None:
    with pytest.raises(ValueError) as error:
        make_tiny(method, **options)
    message = str(error.value)
    assert found in message.split(' is not possible')[0]
    assert allowed in message.split('is not possible: ')[1]
    assert '\n' not in message


@pytest.mark.parametrize(
    'options',
    [
        {'num_heads': 3},
        {'num_heads': 0},
        {'patch_size': 0},
        {'class_token': False},
        {'pos_embed': 'rope'},
        {'act_layer': 'gellu'},
        {'norm_layer': 'layernrm'},
        {'attn_layer': 'flash'},
        {'dtype': torch.int32},
        {'device': 'cpux'},
    ],
    ids=str,
)
def test_what_timm_and_torch_refuse_themselves(make_tiny, options: dict) -> None:
    refusals = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError)
    with pytest.raises((*refusals, TypeError, ValueError)):
        make_tiny('vqmoe', **options)


@pytest.mark.parametrize(
    ('method', 'hint'),
    [('vqmoo', r'; did you mean vqmoe\?'), ('foo', ''), (None, ''), (['smoe'], '')],
)
def test_an_unknown_method_is_named_with_those_that_there_are(method: Any, hint: str) -> None:
    known = f'^method={re.escape(repr(method))} is not possible: one of {", ".join(METHODS)}{hint}$'
    for build in (
        lambda: MoeVisionTransformer(method=method, **TINY),
        lambda: timm.create_model('moe_host', host=DENSE, method=method, **TINY),
        lambda: convert_to_moe(timm.create_model(DENSE, **TINY), method),
    ):
        with pytest.raises(ValueError, match=known):
            build()


def test_padding_lifts_the_demand_on_the_image_size(tiny) -> None:
    model = tiny(img_size=33, dynamic_img_size=True, dynamic_img_pad=True)
    assert model.eval()(torch.randn(2, 3, 33, 33)).shape == (2, 10)


@pytest.mark.parametrize(
    'kwargs',
    [
        {'class_token': False, 'global_pool': 'avg'},
        {'reg_tokens': 4},
        {'reg_tokens': 2, 'no_embed_class': True, 'global_pool': 'avg'},
        {'in_chans': 1},
        {'global_pool': 'map'},
        {'pos_embed': 'none'},
    ],
    ids=str,
)
def test_other_tokens_and_channels(tiny, kwargs: dict) -> None:
    model = tiny(**kwargs).eval()
    assert model(torch.randn(2, kwargs.get('in_chans', 3), 32, 32)).shape == (2, 10)
    assert str(model)


def test_fix_init_scales_experts_as_it_scales_dense_layers(tiny) -> None:
    torch.manual_seed(0)
    plain = tiny()
    torch.manual_seed(0)
    fixed = tiny(fix_init=True)
    # block i is divided by sqrt(2 (i + 1)): 2 for i = 1
    torch.testing.assert_close(
        fixed.blocks[1].mlp.experts.fc2.weight, plain.blocks[1].mlp.experts.fc2.weight / 2
    )
    torch.testing.assert_close(
        fixed.blocks[1].attn.proj.weight, plain.blocks[1].attn.proj.weight / 2
    )
    # 2^0.5 for i = 0
    torch.testing.assert_close(
        fixed.blocks[0].mlp.fc2.weight, plain.blocks[0].mlp.fc2.weight / 2**0.5
    )


def test_the_same_seed_builds_the_same_model(tiny) -> None:
    torch.manual_seed(3)
    first = tiny().state_dict()
    torch.manual_seed(3)
    second = tiny().state_dict()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
