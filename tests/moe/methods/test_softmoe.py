"""SoftMoE against a plain loop over images and slots, and the properties of its two mixtures."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vqmoe_vision.moe import METHODS, collect_losses
from vqmoe_vision.moe.experts import Experts
from vqmoe_vision.moe.raw_patches import Host

D, E = 8, 4


@pytest.fixture
def layer(make_layer):
    """Four experts with three slots each."""
    return make_layer('softmoe', slots_per_expert=3).layer


def answer(experts, e, x):
    hidden = experts.act(F.linear(x, experts.fc1.weight[e], experts.fc1.bias[e]))
    return F.linear(hidden, experts.fc2.weight[e], experts.fc2.bias[e])


def naive(layer, x):
    """Algorithm 2 image by image, slot by slot."""
    out = []
    for image in x:
        tokens = image / image.norm(dim=-1, keepdim=True)
        slots = layer.slot_embed / layer.slot_embed.norm(dim=-1, keepdim=True)
        logits = layer.scale * tokens @ slots.t()
        dispatch = logits.exp() / logits.exp().sum(dim=0, keepdim=True)
        combine = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
        answers = []
        for s in range(layer.num_slots):
            slot = (dispatch[:, s, None] * image).sum(dim=0)
            answers.append(answer(layer.experts, s // layer.slots_per_expert, slot))
        out.append(combine @ torch.stack(answers))
    return torch.stack(out)


def test_output_and_gradients_equal_the_plain_loop(layer):
    with torch.no_grad():
        layer.scale.fill_(3.0)
    weights, grads = torch.randn(3, 5, D), []
    x = torch.randn(3, 5, D)
    outs = []
    for function in (layer, lambda inputs: naive(layer, inputs)):
        layer.zero_grad()
        inputs = x.clone().requires_grad_()
        outs.append(function(inputs))
        (outs[-1] * weights).sum().backward()
        grads.append({'x': inputs.grad} | {n: p.grad.clone() for n, p in layer.named_parameters()})
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    assert all(grad.norm() > 1e-4 for grad in grads[0].values())


def test_dispatch_sums_to_one_over_tokens(layer):
    # identity experts hand back the slots; tokens of ones give slots of ones
    with torch.no_grad():
        for linear in (layer.experts.fc1, layer.experts.fc2):
            linear.bias.zero_()
            linear.weight.zero_()
            linear.weight[:, range(D), range(D)] = 1.0
    layer.experts.act = nn.Identity()
    x = torch.ones(2, 5, D)
    torch.testing.assert_close(layer(x), x)


def test_combine_sums_to_one_over_slots(layer):
    # experts that say the same whatever they read
    constant = torch.randn(D)
    with torch.no_grad():
        layer.experts.fc2.weight.zero_()
        layer.experts.fc2.bias.copy_(constant.expand(E, D))
    torch.testing.assert_close(layer(torch.randn(2, 5, D)), constant.expand(2, 5, D))


def test_outputs_lie_between_the_answers_of_the_experts(layer):
    answers = []
    layer.experts.register_forward_hook(lambda _m, _a, rows: answers.append(rows))
    out = layer(torch.randn(1, 5, D))[0]
    rows = answers[0]
    assert rows.shape == (E * 3, D)
    assert (out >= rows.min(dim=0).values - 1e-6).all()
    assert (out <= rows.max(dim=0).values + 1e-6).all()


def test_logits_ignore_the_lengths_of_tokens_and_slots(layer):
    x = torch.randn(2, 5, D)
    logits = layer.mixing_logits(x)
    torch.testing.assert_close(layer.mixing_logits(x * 7), logits)
    with torch.no_grad():
        layer.slot_embed *= torch.rand(12, 1) + 0.5
    torch.testing.assert_close(layer.mixing_logits(x), logits)
    with torch.no_grad():
        layer.scale *= 2
    torch.testing.assert_close(layer.mixing_logits(x), 2 * logits)


def test_experts_read_the_tokens_not_the_normalised_ones(layer):
    # linear experts: the answer scales with the tokens
    layer.experts.act = nn.Identity()
    with torch.no_grad():
        layer.experts.fc1.bias.zero_()
        layer.experts.fc2.bias.zero_()
    x = torch.randn(2, 5, D)
    torch.testing.assert_close(layer(5 * x), 5 * layer(x))


def test_scale_zero_mixes_evenly(layer):
    with torch.no_grad():
        layer.scale.zero_()
    x = torch.randn(2, 5, D)
    mean = x.mean(dim=1)
    expected = torch.stack([answer(layer.experts, e, mean) for e in range(E)]).mean(dim=0)
    torch.testing.assert_close(layer(x), expected[:, None].expand(2, 5, D))


def test_a_large_scale_with_tokens_as_slots_routes_each_token_to_its_slot(make_layer):
    layer = make_layer('softmoe', slots_per_expert=1).layer
    x = torch.randn(1, E, D)
    with torch.no_grad():
        layer.slot_embed.copy_(x[0])
        layer.scale.fill_(1e4)
    expected = torch.stack([answer(layer.experts, e, x[0, e]) for e in range(E)])
    torch.testing.assert_close(layer(x)[0], expected)


def test_experts_may_be_permuted_with_their_slots(layer):
    x, shuffle = torch.randn(2, 5, D), torch.tensor([2, 0, 3, 1])
    before = layer(x)
    with torch.no_grad():
        slots = layer.slot_embed.view(E, 3, D)[shuffle]
        layer.slot_embed.copy_(slots.reshape(12, D))
        for parameter in layer.experts.parameters():
            parameter.copy_(parameter[shuffle].clone())
    torch.testing.assert_close(layer(x), before)


@pytest.mark.parametrize(('num_experts', 'slots'), [(4, 2), (8, 2)])
def test_as_many_slots_as_tokens_by_default(make_layer, num_experts, slots):
    # the fixture builds with num_tokens = 2 * num_experts
    layer = make_layer('softmoe', num_experts=num_experts).layer
    assert (layer.slots_per_expert, layer.num_slots) == (slots, slots * num_experts)


@pytest.mark.parametrize(
    ('num_experts', 'ratio', 'prefix', 'slots'),
    [
        (4, 2.0, 0, 18),  # 2 * 36 patches / 4
        (4, 2.0, 1, 18),  # the class token is no patch
        (4, 2.0, 5, 18),
        (8, 1.0, 1, 4),  # 36 / 8 = 4.5, to even
        (8, 0.1, 1, 1),  # at least one
    ],
)
def test_slots_per_token_counts_patches(num_experts, ratio, prefix, slots):
    entry = METHODS['softmoe']
    config = entry.config(num_experts=num_experts, slots_per_token=ratio)
    layer = entry.build(D, config, Experts(num_experts, D, 4), Host(36 + prefix, prefix))
    assert (layer.slots_per_expert, layer.num_slots) == (slots, slots * num_experts)


def test_any_number_of_tokens_uses_the_same_slots(layer):
    for num_tokens in (1, 4, 40):
        x = torch.randn(2, num_tokens, D)
        torch.testing.assert_close(layer(x), naive(layer, x))


@pytest.mark.parametrize('preset', ['paper', 'lucidrains'])
def test_autocast_rounds_products_and_no_softmax(make_layer, preset):
    layer = make_layer('softmoe', preset=preset).layer
    x = torch.randn(2, 500, D)
    with torch.autocast('cpu', torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    # bfloat16 rounds products (2^-8), not the sums of 500 exponentials
    assert (out - layer(x)).norm() < 0.01 * layer(x).norm()


@pytest.mark.parametrize(('preset', 'dtype'), [('paper', 'bfloat16'), ('lucidrains', 'float32')])
def test_large_logits_stay_in_float32(make_layer, preset, dtype):
    layer = make_layer('softmoe', preset=preset).layer
    logits = layer.mixing_logits(torch.randn(2, 5, D), torch.bfloat16)
    assert logits.dtype == getattr(torch, dtype)


def test_the_scale_starts_where_it_is_told(make_layer):
    torch.manual_seed(0)
    paper, sharp = make_layer('softmoe').layer, make_layer('softmoe', init_scale=14.0).layer
    sharp.slot_embed.data.copy_(paper.slot_embed.data)
    x = torch.randn(2, 5, D)
    torch.testing.assert_close(sharp.mixing_logits(x), 14 * paper.mixing_logits(x))
    with torch.no_grad():
        sharp.scale.fill_(3)
    sharp.init_weights()
    assert sharp.scale == 14


@pytest.mark.parametrize('scale', [0.0, 9e-5, 1.1e4, -1.0, float('inf'), float('nan')])
def test_an_impossible_scale_is_refused(scale):
    with pytest.raises(ValueError, match=r'init_scale=.* is not possible: from 1e-4 to 1e4'):
        METHODS['softmoe'].config(init_scale=scale)


def test_rms_norms_have_no_scale_to_start(make_layer):
    with pytest.raises(ValueError, match=r"init_scale=.*slot_norm='rms'"):
        make_layer('softmoe', preset='lucidrains', init_scale=2.0)


def test_there_is_no_auxiliary_loss(layer):
    with collect_losses(layer) as collected:
        layer(torch.randn(2, 5, D))
    assert collected.losses == {}


def test_lucidrains_logits_are_products_of_rms_norms(make_layer):
    layer = make_layer('softmoe', preset='lucidrains').layer
    with torch.no_grad():
        layer.token_norm.weight.uniform_(0.5, 2)
        layer.slot_gain.uniform_(0.5, 2)
    x = torch.randn(2, 5, D)
    tokens = F.normalize(x, dim=-1) * D**0.5 * layer.token_norm.weight
    slots = F.normalize(layer.slot_embed, dim=-1) * D**0.5 * layer.slot_gain
    logits = tokens @ slots.t()
    rows = torch.einsum('bns,bnd->sbd', logits.softmax(dim=1), tokens)
    answers = torch.stack([answer(layer.experts, s // 2, rows[s]) for s in range(8)])
    expected = torch.einsum('bns,sbd->bnd', logits.softmax(dim=2), answers)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    # its experts read normalised tokens: the scale of the input is lost
    torch.testing.assert_close(layer(5 * x), layer(x), rtol=1e-4, atol=1e-4)
