"""VQMoE against a plain reading of its equations, token by token."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from vqmoe_vision.moe import collect_losses
from vqmoe_vision.moe.methods.vqmoe import Quantizer, VQMoEConfig

from ... import cases
from ..by_hand import assert_by_hand, expert, moved
from ..codebooks import BY_DISTANCE

D, E = 8, 4
SHARE = 0.3  # of the code; the default 0.05 would hide a mistake
EMA = {'preset': 'ema'}


def read(config, token, code):
    """What the discrete branch feeds its expert, and as straight-through gradients say."""
    code, c = code.detach(), config.code_share
    return {
        'token': token,
        'ste': code + token - token.detach(),
        'mix': token + c * (code - token).detach(),
        'official': (1 - c) * token + c * (code - token).detach(),
    }[config.expert_input]


def nearest(codes, token, cosine):
    """Index of the nearest code, and the code, at the length of the token for cosines."""
    if cosine:
        q = int((codes @ token).argmax())
        return q, codes[q] * token.norm()
    q = int((codes - token).square().sum(dim=1).argmin())
    return q, codes[q]


def naive(layer, x):
    """Equations (1) to (5) for images (B, N, D), one token after the other."""
    config, out = layer.config, []
    for token in x.flatten(0, 1):
        branches = []
        if config.form != 'discrete':
            probs = (layer.router.weight @ token).softmax(dim=0)
            best = int(probs.argmax())
            factor = config.routed_scaling_factor or E / 2
            weight = factor * probs[best] if config.train_router else 1.0
            branches.append(weight * expert(layer.experts, best, token))
        if config.form != 'continuous':
            book = layer.quantizer.codebook
            if config.codebook == 'projected':
                z, v = book.project @ token, book.embed
                cosines = v @ z / (v.norm(dim=1) * z.norm())
                probs = (cosines / 0.3).softmax(dim=0)
                q = int(cosines.argmax())
                answer = expert(layer.experts, q % E, token)
                answer = layer.output_norm(answer) if config.output_norm else answer
                branches.append(probs[q] / probs[q].detach() * answer)
            else:
                q, code = nearest(book.codes(), token, config.use_cosine_sim)
                fed = layer.quantizer.norm(read(config, token, code))
                answer = expert(layer.experts, q % E, fed)
                branches.append(layer.output_norm(answer) if config.output_norm else answer)
        if config.form == 'full':
            gate = (layer.gate.weight @ token + layer.gate.bias).softmax(dim=0)
            out.append(gate[0] * branches[0] + gate[1] * branches[1])
        else:
            out.append(branches[0])
    return torch.stack(out).view_as(x)


# a code share where it has an effect
READINGS = [{'expert_input': name} for name in ('ste', 'token')]
READINGS += [{'expert_input': name, 'code_share': SHARE} for name in ('mix', 'official')]


@cases(
    'options',
    *(
        {**EMA, 'form': form, 'num_codes': codes, **reading}
        for form, codes, reading in product(('full', 'discrete'), (E, 3 * E), READINGS)
    ),
    *({'form': 'continuous', **more} for more in ({}, {'routed_scaling_factor': 4.0})),
    {'preset': 'official', 'code_share': SHARE},
    *({'preset': preset} for preset in ('paper', 'ema')),
    *({**EMA, **norm} for norm in ({'output_norm': True}, {'input_norm': False})),
    {**EMA, 'input_norm': False, 'output_norm': True, 'form': 'discrete', 'expert_input': 'ste'},
    *({**EMA, 'codebook': name} for name in BY_DISTANCE),
    *(
        {**EMA, 'codebook': name, 'use_cosine_sim': True, 'code_share': SHARE}
        for name in BY_DISTANCE
    ),
    *(
        {'code_dim': dim, 'num_codes': codes, 'output_norm': norm, 'router_drop': 0.0}
        for dim, codes, norm in ((3, E, False), (5, 2 * E, True))
    ),
    {'form': 'discrete'},
    {'train_router': False, 'balance_weight': 0.0, 'router_drop': 0.0},
    *({'routed_scaling_factor': factor, 'router_drop': 0.0} for factor in (2.75, None)),
    ids=str,
)
def test_output_and_every_gradient(make_layer, options):
    net = make_layer('vqmoe', **options)
    with torch.no_grad():
        for norm in net.modules():
            if isinstance(norm, torch.nn.LayerNorm):
                norm.weight.uniform_(0.5, 2)
                norm.bias.uniform_(-1, 1)
    x = torch.randn(3, 20, D)
    found = assert_by_hand(net, lambda x: naive(net.layer, x), x, rtol=1e-4, atol=1e-4)
    still = {name for name, value in found.items() if not value.any()}
    codes = {name for name in found if '.codebook.' in name}
    if net.layer.config.codebook == 'projected':  # its weight is 1, and has a gradient
        codes = set()
    frozen = set() if net.layer.config.train_router else {'layer.router.weight'}
    assert still == codes | frozen


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_ste_feeds_exactly_the_code_whatever_the_precision(dtype):
    quantizer = Quantizer(D, VQMoEConfig(codebook='ema', expert_input='ste'))
    x, code = (10 * torch.randn(5, D)).to(dtype).requires_grad_(), torch.randn(5, D).to(dtype) / 8
    out = quantizer.expert_input(x, code)
    weights = torch.randn(5, D).to(dtype)
    out.backward(weights)
    assert torch.equal(out, code) and torch.equal(x.grad, weights)


@cases(
    'codebook, codes',
    ('ema', set()),
    ('plain', {'quantizer.codebook.embed'}),
    ('cvq', {'quantizer.codebook.embed'}),
    ('simvq', {'quantizer.codebook.project.weight', 'quantizer.codebook.project.bias'}),
)
def test_the_vq_loss_moves_codes_and_tokens(make_layer, codebook, codes):
    net, x = make_layer('vqmoe', codebook=codebook), torch.randn(3, 20, D, requires_grad=True)
    with collect_losses(net, update_state=False) as collected:
        net(x)
        assert moved(net, collected.losses['layer/vq']) == codes
        assert moved(net, collected.losses['layer/balance']) == {'router.weight'}
    assert (x.grad != 0).any(dim=-1).all()


def test_statistics(make_layer):
    net, x = make_layer('vqmoe', **EMA, num_codes=3 * E), torch.randn(3, 20, D)
    tokens, layer = x.flatten(0, 1), net.layer
    distance, q = torch.cdist(tokens, layer.quantizer.codebook.codes()).min(dim=1)
    first, error = (tokens @ layer.router.weight.t()).argmax(dim=1), distance.square().mean() / D
    with collect_losses(net, update_state=False) as collected:
        net(x)
    expected = {
        'load': torch.bincount(torch.cat([first, q % E]), minlength=E) / 120,
        'code_usage': torch.bincount(q, minlength=3 * E) / 60,
        'nonfinite_tokens': torch.tensor(0.0),
        'quantization_error': error / tokens.square().mean(),
        'gate_continuous': layer._logits(tokens)[1].softmax(dim=-1)[:, 0].mean(),
        'agreement': (first == q % E).float().mean(),
    }
    actual = {name.removeprefix('layer/'): value for name, value in collected.stats.items()}
    torch.testing.assert_close(actual, expected)
    assert not any(value.requires_grad for value in collected.stats.values())


@pytest.mark.parametrize('name', BY_DISTANCE)
@pytest.mark.parametrize('learns', [True, False], ids=['learning', 'fixed'])
def test_fixed_codes_stay_and_tokens_are_still_drawn_to_them(make_layer, snapshot, name, learns):
    # token -> code -> expert: with the token alone no gradient but that of the loss reaches it
    options = {'form': 'discrete', 'codebook': name, 'train_codebook': learns, 'vq_weight': 1.0}
    net = make_layer('vqmoe', **options).train()
    book, x = net.layer.quantizer.codebook, torch.randn(2, 16, D, requires_grad=True)
    before = snapshot(book)
    # beta = 1/4 of the mean squared distance to the nearest code
    distances = torch.cdist(x.detach().flatten(0, 1), book.codes()).amin(dim=1)
    commitment = 0.25 * distances.square().mean() / D
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.1)
    with collect_losses(net) as collected:
        net(x)
        loss = collected.total()
        loss.backward()
        optimizer.step()
    kept = all(torch.equal(before[key], value) for key, value in book.state_dict().items())
    assert kept == (not learns)
    if not learns:
        torch.testing.assert_close(loss, commitment)
        assert x.grad.abs().amax() > 0


@pytest.mark.parametrize('codebook', BY_DISTANCE)
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
    assert x.grad.abs().max() > 1e-5
    names = {name for name, _ in net.layer.named_parameters()}
    assert learned == {name for name in names if name.startswith('quantizer.codebook.')}


def test_a_step_against_the_diversity_loss_evens_the_use_of_codes_known_answer(make_layer):
    # in one channel of D = 8, codes at 0 and 2, tokens at 0.8 three times and at 1.8: the mean
    # probability of the first is above one half, and tokens near the border move to the second
    net = make_layer('vqmoe', **EMA, num_experts=2, diversity_weight=1.0, code_share=0.0)
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


def test_the_paper_preset_is_the_papers_equations_known_answer(make_layer):
    # (2) to (4): half of p f_i(x) and half of f_q(v_q), the code itself without a norm
    net, x = make_layer('vqmoe', preset='paper'), torch.randn(3, 20, D)
    layer, tokens = net.layer, x.flatten(0, 1)
    layer.init_weights()
    codes = layer.quantizer.codebook.embed
    nearest = torch.cdist(tokens, codes).min(dim=1)
    probs = (tokens @ layer.router.weight.t()).softmax(dim=-1).max(dim=-1)
    answers = [
        0.5 * p * expert(layer.experts, i, token) + 0.5 * expert(layer.experts, q, codes[q])
        for token, p, i, q in zip(tokens, *probs, nearest.indices, strict=True)
    ]
    with collect_losses(net) as collected:
        torch.testing.assert_close(net(x).flatten(0, 1), torch.stack(answers))
    # (6): alpha (1 + beta) = 0.08 * 1.25 times the mean square, and nothing else
    loss = 0.08 * 1.25 * nearest.values.square().mean() / D
    torch.testing.assert_close(dict(collected.losses), {'layer/vq': loss})


def test_codes_of_a_learned_space_are_balanced_as_the_router(make_layer):
    net, x = make_layer('vqmoe', router_drop=0.0), torch.randn(3, 20, D)
    book, tokens = net.layer.quantizer.codebook, x.flatten(0, 1)
    cosines = F.normalize(tokens @ book.project.T, dim=1) @ F.normalize(book.embed, dim=1).T
    probs, q = (cosines / 0.3).softmax(dim=1), cosines.argmax(dim=1)
    shares = torch.bincount(q, minlength=E) / len(q)
    with collect_losses(net, update_state=False) as collected:
        net(x)
        assert moved(net, collected.losses['layer/code_balance']) == {
            'quantizer.codebook.project', 'quantizer.codebook.embed',
        }  # fmt: skip
    # 0.01 E sum_i f_i P_i
    expected = 0.01 * E * (shares * probs.mean(dim=0)).sum()
    torch.testing.assert_close(collected.losses['layer/code_balance'], expected.detach())
    assert collected.losses.keys() == {'layer/balance', 'layer/code_balance'}
    # |z - v|^2 of vectors of length one
    error = (2 - 2 * cosines.amax(dim=1)).mean().detach()
    torch.testing.assert_close(collected.stats['layer/quantization_error'], error)


def test_dropped_tokens_are_trained_as_the_discrete_form_computes_them(make_layer):
    net = make_layer('vqmoe', router_drop=0.25)
    x = torch.randn(8, 500, D)
    with torch.no_grad():
        full = net.eval()(x)
        with collect_losses(net.train(), update_state=False):
            mixed = net(x)
        net.layer.to_discrete()
        discrete = net.eval()(x)
    like = [(mixed - other).abs().amax(dim=-1) < 1e-5 for other in (discrete, full)]
    assert (like[0] | like[1]).all()
    # of 4,000 tokens five standard deviations are 0.034
    assert like[0].float().mean().item() == pytest.approx(0.25, abs=0.035)
