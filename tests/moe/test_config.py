"""Options: what is refused says which field, which value and what is allowed."""

import dataclasses
import math
from typing import get_args

import pytest
import torch

from vqmoe_vision.moe import METHODS, MoeConfig, collect_losses
from vqmoe_vision.moe.codebooks import CODEBOOKS
from vqmoe_vision.moe.config import TopKConfig, check, types_of

PRESETS = [(name, preset) for name, method in METHODS.items() for preset in method.config.PRESETS]


@pytest.mark.parametrize(('method', 'preset'), PRESETS)
def test_a_preset_sets_exactly_its_fields(method, preset):
    config = METHODS[method].config
    changed = config.PRESETS[preset]
    assert config.from_options(preset=preset) == dataclasses.replace(config(), **changed)


@pytest.mark.parametrize(('method', 'preset'), PRESETS)
def test_a_single_option_wins_over_the_preset(method, preset):
    config = METHODS[method].config.from_options(preset=preset, num_experts=6, expert_mlp_ratio=2)
    assert (config.num_experts, config.expert_mlp_ratio) == (6, 2)


@pytest.mark.parametrize('method', METHODS)
def test_without_a_preset_options_are_the_defaults(method):
    config = METHODS[method].config
    assert config.from_options() == config.from_options(preset=None) == config()


@pytest.mark.parametrize('method', METHODS)
def test_an_unknown_option_is_a_type_error(method):
    with pytest.raises(TypeError, match='num_exprts'):
        METHODS[method].config.from_options(num_exprts=4)


@pytest.mark.parametrize('method', METHODS)
def test_an_unknown_preset_names_the_known_ones(method):
    with pytest.raises(ValueError, match=r"preset='papr' is not possible: one of \[.*'paper'"):
        METHODS[method].config.from_options(preset='papr')


@pytest.mark.parametrize('method', METHODS)
def test_options_are_the_fields_and_the_preset(method):
    config = METHODS[method].config
    assert config.option_names() == {f.name for f in dataclasses.fields(config)} | {'preset'}


@pytest.mark.parametrize(
    ('config', 'field', 'value'),
    [
        (MoeConfig, 'num_experts', 0),
        (MoeConfig, 'expert_mlp_ratio', 0.0),
        (TopKConfig, 'top_k', 0),
        (TopKConfig, 'top_k', 9),
    ],
)
def test_an_impossible_value_names_the_field_and_the_value(config, field, value):
    with pytest.raises(ValueError, match=f'{field}={value!r} is not possible'):
        config(**{field: value})


@pytest.mark.parametrize('method', ['smoe', 'xmoe'])
def test_a_router_that_cannot_learn_is_refused(method):
    # one expert, renormalised: its weight is identically 1
    with pytest.raises(ValueError, match='renormalize=True is not possible'):
        METHODS[method].config(top_k=1, renormalize=True)


@pytest.mark.parametrize(
    ('method', 'options', 'field'),
    [
        ('smoe', {'router_noise': 0.0}, 'load_weight'),
        ('smoe', {'z_weight': -1.0}, 'z_weight'),
        ('smoe', {'capacity_factor': 0.0}, 'capacity_factor'),
        ('smoe', {'eval_capacity_factor': -1.0}, 'eval_capacity_factor'),
        ('smoe', {'batch_prioritized': True}, 'batch_prioritized'),
        ('smoe', {'train_router': False}, 'importance_weight'),
        ('smoe', {'preset': 'frozen', 'router_noise': 1.0, 'load_weight': 0.1}, 'load_weight'),
        ('smoe', {'preset': 'frozen', 'balance_weight': 0.1}, 'balance_weight'),
        ('smoe', {'preset': 'frozen', 'z_weight': 0.1}, 'z_weight'),
        ('smoe', {'preset': ['frozen']}, 'preset'),
        ('xmoe', {'gate': 'tanh'}, 'gate'),
        ('xmoe', {'router_dim': 1}, 'router_dim'),
        ('xmoe', {'temperature': 0.0}, 'temperature'),
        ('xmoe', {'balance_temperature': -1.0}, 'balance_temperature'),
        # all gates would be equal, with no gradient
        ('xmoe', {'temperature': math.inf}, 'temperature'),
        ('xmoe', {'balance_temperature': math.inf}, 'balance_temperature'),
        ('stablemoe', {'stage1_steps': 0}, 'stage1_steps'),
        ('stablemoe', {'stage1_fraction': 0.0}, 'stage1_fraction'),
        ('stablemoe', {'two_stage': False, 'top_k': 1}, 'top_k'),
        ('softmoe', {'slots_per_expert': 0}, 'slots_per_expert'),
        ('softmoe', {'slots_per_token': 0.0}, 'slots_per_token'),
        ('softmoe', {'slots_per_token': math.inf}, 'slots_per_token'),
        ('softmoe', {'slots_per_expert': 4, 'slots_per_token': 2.0}, 'slots_per_expert'),
        ('softmoe', {'slot_norm': 'l1'}, 'slot_norm'),
        ('vqmoe', {'form': 'both'}, 'form'),
        ('vqmoe', {'codebook': 'kmeans'}, 'codebook'),
        ('vqmoe', {'expert_input': 'code'}, 'expert_input'),
        ('vqmoe', {'code_share': 1.5}, 'code_share'),
        ('vqmoe', {'num_codes': 12}, 'num_codes'),  # 8 experts
        ('vqmoe', {'num_codes': 0}, 'num_codes'),
        ('vqmoe', {'vq_weight': -0.1}, 'vq_weight'),
        ('vqmoe', {'train_router': False}, 'balance_weight'),
        # no effect with the others
        ('vqmoe', {'form': 'discrete', 'balance_weight': 5.0}, 'balance_weight'),
        ('vqmoe', {'form': 'continuous', 'num_codes': 16}, 'num_codes'),
        ('vqmoe', {'form': 'continuous', 'vq_weight': 9.0}, 'vq_weight'),
        ('vqmoe', {'expert_input': 'ste', 'code_share': 0.9}, 'code_share'),
        # also if the value is the default
        ('vqmoe', {'expert_input': 'ste', 'code_share': 0.05}, 'code_share'),
        (
            'vqmoe',
            {'form': 'discrete', 'expert_input': 'ste', 'code_share': 0.3},
            'code_share',
        ),
        ('vqmoe', {'vq_weight': 0.0, 'commitment': 3.0}, 'commitment'),
        ('vqmoe', {'commitment': 0.0, 'vq_weight': 0.5}, 'vq_weight'),
        (
            'vqmoe',
            {'codebook': 'plain', 'train_codebook': False, 'commitment': 0.0, 'vq_weight': 0.5},
            'vq_weight',
        ),
        ('stablemoe', {'stage1_steps': 7, 'stage1_fraction': 0.1}, 'stage1_fraction'),
        ('stablemoe', {'two_stage': False, 'top_k': 2, 'stage1_steps': 7}, 'stage1_steps'),
        ('xmoe', {'balance_weight': 0.0, 'balance_temperature': 9.0}, 'balance_temperature'),
        # of another type, or not finite
        ('smoe', {'num_experts': 2.5}, 'num_experts'),
        ('smoe', {'num_experts': '8'}, 'num_experts'),
        ('smoe', {'num_experts': True}, 'num_experts'),
        ('smoe', {'top_k': 1.5}, 'top_k'),
        ('smoe', {'renormalize': 'no'}, 'renormalize'),
        ('smoe', {'router_noise': math.inf}, 'router_noise'),
        ('xmoe', {'expert_mlp_ratio': math.inf}, 'expert_mlp_ratio'),
    ],
)
def test_impossible_options_of_a_method(method, options, field):
    with pytest.raises(ValueError, match=f'^{field}=.* is not possible: '):
        METHODS[method].config.from_options(**options)


@pytest.mark.parametrize('method', METHODS)
def test_numbers_that_no_tensor_holds_are_refused(method):
    kind = METHODS[method].config
    for name, hint in types_of(kind).items():
        parts = get_args(hint) or (hint,)
        sizes = {int: [2**31, 10**400], float: [1e-40, 1e40, 10**40, 10**400]}
        for value in (size for part in parts for size in sizes.get(part, [])):
            with pytest.raises(ValueError, match=f'^{name}=.* is not possible: ') as refusal:
                kind.from_options(**{name: value})
            assert '\n' not in str(refusal.value)


def test_a_number_that_an_option_bounds_closer_is_told_its_bounds():
    kind = METHODS['softmoe'].config
    for value in (10**10, 1e31):
        with pytest.raises(ValueError, match=r'init_scale=.* is not possible: from 1e-4 to 1e4'):
            kind.from_options(init_scale=value)
    assert METHODS['smoe'].config.from_options(capacity_factor=10**10).capacity_factor == 10**10


@pytest.mark.parametrize('codebook', CODEBOOKS)
@pytest.mark.parametrize('train_codebook', [True, False])
def test_the_weight_of_a_loss_has_no_effect_where_the_loss_is_zero(
    make_layer, codebook, train_codebook
):
    options = {'codebook': codebook, 'train_codebook': train_codebook, 'commitment': 0.0}
    layer = make_layer('vqmoe', **options)
    with collect_losses(layer) as collected:
        layer(torch.randn(4, 6, 8))
    zero = collected.losses['layer/vq'].item() == 0
    config = METHODS['vqmoe'].config
    assert ('vq_weight' in config.of_preset(vq_weight=0.5, **options).unused()) == zero


def test_a_value_is_shown_in_one_line_of_bearable_length() -> None:
    with pytest.raises(ValueError, match='is not possible: a name') as refusal:
        check(False, 'upcycle', {'weight': torch.zeros(100, 100)}, 'a name')
    assert '\n' not in str(refusal.value) and len(str(refusal.value)) < 600
