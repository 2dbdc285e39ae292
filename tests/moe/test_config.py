"""Options: what is refused says which field, which value and what is allowed."""

import math
import re

import pytest
import torch

from vqmoe_vision.moe import METHODS, collect_losses
from vqmoe_vision.moe.config import check

from .codebooks import BY_DISTANCE

# the message names the last option of each
REFUSED = {
    'smoe': """
        num_experts=0 | num_experts=2.5 | num_experts='8' | num_experts=True | expert_mlp_ratio=0.0
        expert_mlp_ratio=inf | top_k=0 | top_k=9 | top_k=1.5 | renormalize='no'
        top_k=1, renormalize=True | router_noise=inf | router_noise=0.0, load_weight=0.1
        z_weight=-1.0 | capacity_factor=0.0 | eval_capacity_factor=-1.0 | batch_prioritized=True
        router_init_scale=9e-7 | router_init_scale=nan | preset='papr' | preset=['frozen']
        train_router=False, importance_weight=0.1 | preset='frozen', bias_update_rate=0.1
        preset='frozen', router_noise=1.0, load_weight=0.1 | preset='frozen', z_weight=0.1
    """,
    'xmoe': """
        gate='tanh' | top_k=1, renormalize=True | router_dim=1 | temperature=0.0 | temperature=inf
        balance_temperature=-1.0 | balance_weight=0.0, balance_temperature=9.0
        bias_update_rate=-0.1
    """,
    'stablemoe': """
        stage1_steps=0 | stage1_fraction=0.0 | two_stage=False, top_k=1
        stage1_steps=7, stage1_fraction=0.1 | two_stage=False, top_k=2, stage1_steps=7
    """,
    'softmoe': """
        slots_per_token=0.0 | slots_per_token=inf | slots_per_token=2.0, slots_per_expert=4
        slot_norm='l1' | init_scale=9e-5 | init_scale=10**10 | preset='lucidrains', init_scale=2.0
    """,
    'ecmoe': 'capacity_factor=0.0 | capacity_factor=9.0 | capacity_factor=inf',
    # num_codes of 8 experts; then what has no effect with the others, also if it is the default
    'vqmoe': """
        form='both' | codebook='kmeans' | expert_input='code' | code_share=1.5 | num_codes=12
        num_codes=0 | vq_weight=-0.1 | diversity_weight=inf | ema_decay=1.0
        dead_code_threshold=-0.1 | routed_scaling_factor=nan
        train_router=False, balance_weight=0.01
        codebook='ema', form='discrete', balance_weight=5.0
        codebook='ema', form='discrete', global_balance=False
        form='discrete', routed_scaling_factor=2.0
        train_router=False, balance_weight=0.0, routed_scaling_factor=2.0
        balance_weight=0.0, global_balance=False | form='continuous', num_codes=16
        form='continuous', vq_weight=9.0 | form='continuous', diversity_weight=0.1
        form='continuous', dead_code_threshold=0.1 | form='continuous', use_cosine_sim=True
        codebook='ema', expert_input='ste', code_share=0.05
        codebook='ema', expert_input='token', rotation_trick=True
        codebook='ema', code_share=0.0, rotation_trick=True
        codebook='ema', vq_weight=0.0, commitment=3.0 | vq_weight=0.08
        codebook='simvq', commitment=0.0, train_codebook=False, vq_weight=0.5
        codebook='plain', ema_decay=0.9 | codebook='cvq', dead_code_threshold=0.1
        codebook='ema', train_codebook=False, ema_decay=0.9
    """,
}
NUMBERS = {'inf': math.inf, 'nan': math.nan}


@pytest.mark.parametrize(
    'method, given',
    [(m, each.strip()) for m, text in REFUSED.items() for each in re.split(r'\||\n', text.strip())],
)
def test_impossible_options_and_those_without_effect(method, given):
    options = eval(f'dict({given})', NUMBERS)
    *_, field = options
    with pytest.raises(ValueError, match=f'^{field}=.* is not possible: '):
        METHODS[method].config.from_options(**options)


@pytest.mark.parametrize('codebook', BY_DISTANCE)
@pytest.mark.parametrize('train', [True, False])
def test_the_weight_of_a_loss_has_no_effect_where_the_loss_is_zero(make_layer, codebook, train):
    options = {'codebook': codebook, 'train_codebook': train, 'commitment': 0.0}
    layer = make_layer('vqmoe', **options)
    with collect_losses(layer) as collected:
        layer(torch.randn(4, 6, 8))
    zero = collected.losses['layer/vq'].item() == 0
    config = METHODS['vqmoe'].config
    assert ('vq_weight' in config.of_preset(vq_weight=0.5, **options).unused()) == zero


def test_a_value_is_shown_in_one_line_of_bearable_length():
    with pytest.raises(ValueError, match='is not possible: a name') as refusal:
        check(False, 'upcycle', {'weight': torch.zeros(100, 100)}, 'a name')
    assert '\n' not in str(refusal.value) and len(str(refusal.value)) < 600
