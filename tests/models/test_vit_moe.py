"""Names, sizes, options and their mistakes."""

from dataclasses import fields

import pytest
from torch import nn

from vqmoe_vision.models.layers import resolve_moe_layers
from vqmoe_vision.moe import METHODS

from .. import cases
from ..variants import trials


@cases(
    'layers, depth, expected',
    ('every2', 5, (1, 3)),
    ('all', 3, (0, 1, 2)),
    ('every3', 7, (2, 5)),
    ('last2', 12, (9, 11)),  # V-MoE's Last 2 of a B/16
    ([2, 0, 2], 3, (0, 2)),
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
