"""Options of VQMoE that change its start and its balance, and the preset of the paper."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from vqmoe_vision.moe import MoeConfig, collect_losses
from vqmoe_vision.moe.codebooks import CODEBOOKS
from vqmoe_vision.moe.methods.vqmoe import VQMoEConfig

from .by_hand import D, E, expert, moved

# --- the router's weight


def test_a_scaled_router_starts_as_strong_as_a_code_known_answer(make_layer):
    # zero logits give four experts 1 / 4 each; times four, the first expert's answer as it is, and
    # nothing of it in the balance loss: 4 * 1 * 1 / 4 = 1 of everything on the first
    options = {'form': 'continuous', 'balance_weight': 1.0}
    net = make_layer('vqmoe', routed_scaling_factor=4.0, **options)
    torch.nn.init.zeros_(net.layer.router.weight)
    x = torch.randn(2, 5, D)
    expected = torch.stack([expert(net.layer, 0, token) for token in x.flatten(0, 1)])
    with collect_losses(net) as collected:
        torch.testing.assert_close(net(x).flatten(0, 1), expected)
    torch.testing.assert_close(collected.losses['layer/balance'], torch.tensor(1.0))


def test_the_gradient_of_a_router_is_scaled_too(make_layer):
    # renormalised, the one weight would be 1 and have none
    nets = [make_layer('vqmoe', form='continuous', routed_scaling_factor=f) for f in (1.0, 4.0)]
    nets[1].load_state_dict(nets[0].state_dict())
    x = torch.randn(2, 5, D)
    for net in nets:
        net(x).sum().backward()
    once, scaled = (net.layer.router.weight.grad for net in nets)
    assert once.abs().max() > 0.01
    torch.testing.assert_close(scaled, 4 * once)


@pytest.mark.parametrize(
    'options',
    [
        *({'routed_scaling_factor': factor} for factor in (0.0, -1.0, math.inf, math.nan)),
        {'form': 'discrete', 'routed_scaling_factor': 2.0},
        {'train_router': False, 'balance_weight': 0.0, 'routed_scaling_factor': 2.0},
    ],
    ids=str,
)
def test_scales_of_a_router_that_are_impossible_or_without_effect(options):
    with pytest.raises(ValueError, match=r'^routed_scaling_factor='):
        VQMoEConfig.from_options(**options)


# --- the use of codes


@pytest.mark.parametrize('codebook', CODEBOOKS)
@pytest.mark.parametrize('cosine', [False, True], ids=['euclidean', 'cosine'])
def test_the_diversity_loss_is_of_soft_assignments(make_layer, codebook, cosine):
    options = {'diversity_weight': 0.5, 'codebook': codebook, 'use_cosine_sim': cosine}
    net, x = make_layer('vqmoe', **options), torch.randn(3, 20, D, requires_grad=True)
    tokens, codes = x.flatten(0, 1), net.layer.quantizer.codebook.codes()
    tokens = F.normalize(tokens, dim=1) if cosine else tokens
    distance = (tokens[:, None] - codes).square().sum(dim=2) / (1 if cosine else D)
    means = (-distance / 0.1).softmax(dim=1).mean(dim=0)
    expected = 0.5 * (math.log(E) + (means * means.log()).sum())
    with collect_losses(net, update_state=False) as collected:
        net(x)
        torch.testing.assert_close(collected.losses['layer/diversity'], expected)
        learned = moved(net, collected.losses['layer/diversity'])
    # tokens, and codes that learn by gradient
    assert x.grad.abs().max() > 1e-5
    assert learned == {
        name for name, _ in net.layer.named_parameters() if name.startswith('quantizer.codebook.')
    }


def test_a_step_against_the_diversity_loss_evens_the_use_of_codes_known_answer(make_layer):
    # in one channel of D = 8, codes at 0 and 2, tokens at 0.8 three times and at 1.8: the mean
    # probability of the first is above one half, and tokens near the border move to the second
    net = make_layer('vqmoe', num_experts=2, diversity_weight=1.0, code_share=0.0)
    with torch.no_grad():
        net.layer.quantizer.codebook.embed.zero_()
        net.layer.quantizer.codebook.embed[1, 0] = 2.0
    x = torch.zeros(1, 4, D)
    x[0, :, 0] = torch.tensor([0.8, 0.8, 0.8, 1.8])
    x.requires_grad_()
    with collect_losses(net, update_state=False) as collected:
        net(x)
        collected.losses['layer/diversity'].backward()
    # distance^2 / D / 0.1: 0.64 and 1.44, 3.24 and 0.04 over 0.8: 1 / (1 + e^-1) = 0.731 and
    # 1 / (1 + e^4) = 0.018 of the first; mean 0.553, so that its probability falls
    assert (x.grad[0, :3, 0] < 0).all()
    p, first = torch.tensor([0.731059, 0.731059, 0.731059, 0.017986]), 0.552790
    # d loss / d p_t = ln(first / (1 - first)) / 4, d p / d x = -p (1 - p) 4 / (D 0.1)
    slope = math.log(first / (1 - first)) / 4
    torch.testing.assert_close(x.grad[0, :, 0], -slope * p * (1 - p) * 4 / 0.8, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    'options',
    [
        {'diversity_weight': -0.1},
        {'diversity_weight': math.inf},
        {'form': 'continuous', 'diversity_weight': 0.1},
        {'balance_weight': 0.0, 'global_balance': False},
        {'form': 'discrete', 'global_balance': False},
    ],
    ids=str,
)
def test_losses_of_codes_that_are_impossible_or_without_effect(options):
    *_, name = options
    with pytest.raises(ValueError, match=f'^{name}='):
        VQMoEConfig.from_options(**options)
    if name == 'global_balance':
        VQMoEConfig.from_options(**options, diversity_weight=0.1)


# --- the paper


def test_the_paper_preset_is_the_papers_equations_known_answer(make_layer):
    # (2) to (4): half of p f_i(x) and half of f_q(v_q), the code itself without a norm
    net, x = make_layer('vqmoe', preset='paper'), torch.randn(3, 20, D)
    layer, tokens = net.layer, x.flatten(0, 1)
    layer.init_weights()
    codes = layer.quantizer.codebook.embed
    nearest = torch.cdist(tokens, codes).min(dim=1)
    probs = (tokens @ layer.router.weight.t()).softmax(dim=-1).max(dim=-1)
    answers = [
        0.5 * p * expert(layer, i, token) + 0.5 * expert(layer, q, codes[q])
        for token, p, i, q in zip(tokens, *probs, nearest.indices, strict=True)
    ]
    with collect_losses(net) as collected:
        torch.testing.assert_close(net(x).flatten(0, 1), torch.stack(answers))
    # (6): alpha (1 + beta) = 0.08 * 1.25 times the mean square, and nothing else
    loss = 0.08 * 1.25 * nearest.values.square().mean() / D
    torch.testing.assert_close(dict(collected.losses), {'layer/vq': loss})


def test_the_paper_preset_leaves_nothing_to_the_defaults():
    # but the sizes of any model, and what has no effect in it
    preset = VQMoEConfig.PRESETS['paper']
    unused = VQMoEConfig.from_options(preset='paper').unused().keys()
    sizes = {field.name for field in dataclasses.fields(MoeConfig)}
    every = {field.name for field in dataclasses.fields(VQMoEConfig)}
    assert preset.keys() == every - unused - sizes
