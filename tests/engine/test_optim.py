import math

import pytest
import timm
import torch
from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

import vqmoe_vision  # noqa: F401
from vqmoe_vision.engine.optim import (
    CpuAmpOptimWrapper,
    TimmOptimWrapperConstructor,
    undecayed_parameters,
)

from .. import cases


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = timm.create_model(
            'vit_tiny_vqmoe', img_size=8, patch_size=4, embed_dim=12, depth=2, num_heads=3,
            num_classes=2, num_experts=2, codebook='cvq',
        )  # fmt: skip


def test_constructor_decays_matrices_only():
    model = Wrapped()
    build = TimmOptimWrapperConstructor({'optimizer': {'type': 'AdamW', 'weight_decay': 0.3}})
    groups = build(model).optimizer.param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {names[id(p)] for g in groups if g['weight_decay'] == 0.3 for p in g['params']}
    kept = {names[id(p)] for g in groups if g['weight_decay'] == 0.0 for p in g['params']}
    assert decayed | kept == set(names.values())
    assert 'model.blocks.1.mlp.experts.fc1.weight' in decayed
    assert {'model.pos_embed', 'model.blocks.1.mlp.experts.fc1.bias'} <= kept


SGD = {'type': 'SGD', 'lr': 1.0, 'weight_decay': 0.3}


def test_the_longest_custom_key_wins_as_in_mmengine():
    model = Wrapped()
    keys = {
        'blocks': {'lr_mult': 0.5},
        'blocks.1': {'lr_mult': 0.1, 'decay_mult': 2.0},
        'head': {'decay_mult': 0.0},
    }

    def settings(kind: type) -> dict[str, tuple[float, float]]:
        build = kind({'optimizer': SGD}, {'custom_keys': keys})
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        return {
            names[id(parameter)]: (group['lr'], group['weight_decay'])
            for group in build(model).optimizer.param_groups
            for parameter in group['params']
        }

    ours, theirs = settings(TimmOptimWrapperConstructor), settings(DefaultOptimWrapperConstructor)
    assert ours['model.blocks.1.attn.qkv.weight'] == (0.1, 0.6)
    undecayed = undecayed_parameters(model)
    for name, parameter in model.named_parameters():
        if parameter.ndim <= 1 or name.endswith('.bias') or name in undecayed:
            assert ours[name] == (theirs[name][0], 0.0)  # timm's rule
        else:
            assert ours[name] == theirs[name]


@cases(
    'paramwise, message',
    ({'norm_decay_mult': 0.0}, r'norm_decay_mult=0\.0 is not possible: .* takes custom_keys'),
    *(
        (
            {'custom_keys': {'head': {name: value}}},
            rf"\['head'\]\.{name}=.* lr_mult or decay_mult",
        )
        for name, value in (('lr', 1.0), *(('lr_mult', v) for v in ('ten', -1.0, math.nan)))
    ),
    ({'custom_keys': {'hed': {'lr_mult': 2.0}}}, r"custom_keys='hed' .* model\.cls_token"),
)
def test_constructor_refuses_what_it_would_ignore(paramwise, message):
    config = {'optimizer': {'type': 'SGD', 'lr': 1.0}}
    with pytest.raises(ValueError, match=message):
        TimmOptimWrapperConstructor(config, paramwise)(Wrapped())


def test_cpu_amp_runs_the_forward_pass_in_bfloat16_and_steps_in_float32():
    layer = nn.Linear(3, 2)
    wrapper = CpuAmpOptimWrapper(optimizer=torch.optim.SGD(layer.parameters(), lr=1.0))
    before = layer.weight.detach().clone()
    with wrapper.optim_context(layer):
        out = layer(torch.ones(4, 3))
    assert out.dtype == torch.bfloat16
    wrapper.update_params(out.sum())
    # d(sum of 4 rows)/dw = 4 for each weight
    torch.testing.assert_close(layer.weight.detach(), before - 4)
