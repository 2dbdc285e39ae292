"""Names, sizes, options and their mistakes."""

from dataclasses import fields
from typing import Any

import pytest
import timm
from torch import nn

from vqmoe_vision.models import MoeVisionTransformer
from vqmoe_vision.models.layers import resolve_moe_layers
from vqmoe_vision.moe import METHODS, MoeLayer

from .. import cases, on_meta
from ..variants import trials

NAMES = timm.list_models('vit_*', module='vit_moe')


@pytest.mark.parametrize('name', NAMES)
def test_default_size_and_placement(name):
    _, size, method = name.split('_')
    with on_meta():
        model: Any = timm.create_model(name)
        dense: Any = timm.create_model(f'vit_{size}_patch16_224')
    assert isinstance(model, MoeVisionTransformer)
    assert (model.method, model.num_classes) == (method, 1000)
    assert model.patch_embed.img_size == (224, 224)
    routed = [i for i, block in enumerate(model.blocks) if isinstance(block.mlp, MoeLayer)]
    assert routed == list(range(len(dense.blocks)))[1::2]
    experts = model.blocks[1].mlp.experts
    hidden, width = dense.blocks[1].mlp.fc1.weight.shape
    assert experts.fc1.weight.shape == (8, hidden, width)
    assert experts.fc2.weight.shape == (8, width, hidden)
    # nothing but the MLPs, and what reads the image for them, differs from timm's model of the size
    others = {k: v.shape for k, v in dense.state_dict().items() if '.mlp.' not in k}
    own = {k: v.shape for k, v in model.state_dict().items() if '.mlp.' not in k}
    assert {k: v for k, v in own.items() if not k.startswith('patch_embed.reader.')} == others


@cases(
    'layers, depth, expected',
    ('every2', 5, (1, 3)),
    ('every2', 6, (1, 3, 5)),
    ('every1', 3, (0, 1, 2)),
    ('all', 3, (0, 1, 2)),
    ('every3', 7, (2, 5)),
    ('last2', 12, (9, 11)),  # V-MoE's Last 2 of a B/16
    ('last1', 4, (3,)),
    ([2, 0, 2], 3, (0, 2)),
    ((1,), 3, (1,)),
    (range(2), 4, (0, 1)),
)
def test_which_blocks_are_moe(layers, depth, expected):
    assert resolve_moe_layers(layers, depth) == expected


@pytest.mark.parametrize('method', METHODS)
def test_every_option_is_tried_with_another_value_than_its_default(method):
    config = METHODS[method].config
    shared = {'num_experts', 'expert_mlp_ratio'}  # of every method, and tried below
    tried = [config.from_options(preset) for preset in config.PRESETS]
    tried += [config.from_options(**options) for options in trials(config).values()]
    for field in fields(config):
        values = [getattr(each, field.name) for each in tried]
        assert field.name in shared or any(value != field.default for value in values), field.name


def test_options_of_the_vit_reach_the_experts(tiny):
    model = tiny(mlp_ratio=2.0, act_layer='relu', proj_bias=False, proj_drop_rate=0.3)
    experts = model.blocks[1].mlp.experts
    assert experts.fc1.weight.shape[1] == 64
    assert isinstance(experts.act, nn.ReLU)
    assert experts.fc1.bias is None and experts.fc2.bias is None
    assert experts.drop1.p == experts.drop2.p == 0.3
