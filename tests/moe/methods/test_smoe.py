"""SMoE against the equations of V-MoE, capacity included."""

import itertools
import math

import pytest
import torch

from vqmoe_vision.analysis.record import record_layers
from vqmoe_vision.moe import collect_losses, losses
from vqmoe_vision.moe.losses import values_of
from vqmoe_vision.moe.methods.smoe import SMoEConfig, SMoERouter

from ... import cases
from ..by_hand import assert_by_hand, expert

D, E = 8, 4


def make_router(**options):
    router = SMoERouter(D, SMoEConfig.from_options(num_experts=E, **options))
    torch.nn.init.normal_(router.weight, std=0.5)
    return router


SILENT = {'router_noise': 0.0, 'load_weight': 0.0}


@cases(
    'options',
    *({'top_k': k, **SILENT} for k in (1, 2, E)),
    {'renormalize': True, **SILENT},
    {'preset': 'group'},
    {'renormalize': True, 'capacity_factor': 0.5, **SILENT},
    {'score': 'sigmoid', **SILENT},
    {'preset': 'sigmoid', 'num_shared_experts': 1},
    {'preset': 'shared', **SILENT},
    {'num_shared_experts': 2, 'capacity_factor': 0.5, **SILENT},
    {'preset': 'fine', 'num_experts': 12, **SILENT},
    ids=str,
)
def test_output_and_every_gradient(make_layer, options):
    net = make_layer('smoe', **options)
    router, places = net.layer.router, options.get('capacity_factor')
    if router.bias is not None:
        torch.nn.init.normal_(router.bias)
    if router.has_state:
        torch.nn.init.normal_(router.choice_bias, std=0.3)
    experts, shared = net.layer.experts, options.get('num_shared_experts', 0)
    shared += options.get('preset') == 'shared'
    number = experts.num_experts - shared

    def naive(x):
        """(1) and (2), of DeepSeek-V3 (12) to (16); a queue has first choices first."""
        tokens, k = x.flatten(0, 1), router.config.top_k
        left = [math.ceil(k * len(tokens) * places / number) if places else len(tokens)] * number
        last = range(number, experts.num_experts)
        out = [sum((expert(experts, e, token) for e in last), torch.zeros(D)) for token in tokens]
        for choice in range(k):
            for t, token in enumerate(tokens):
                logits = router.weight @ token + (0 if router.bias is None else router.bias)
                gates = 1 / (1 + (-logits).exp())
                if router.config.score == 'softmax':
                    gates = logits.exp() / logits.exp().sum()
                ranked = gates + (router.choice_bias if router.has_state else 0)
                best = ranked.argsort(descending=True)[:k]
                total = gates[best].sum() if router.config.renormalize else 1.0
                e = int(best[choice])
                if left[e] > 0:
                    answer = expert(experts, e, token)
                    out[t] = out[t] + gates[e] / total * answer
                left[e] -= 1
        return torch.stack(out).view_as(x)

    assert_by_hand(net, naive, torch.randn(2, 7, D), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('logits', list(itertools.permutations([200.0, 90.0, 50.0, 0.0])))
def test_choices_follow_the_logits_where_probabilities_underflow(logits):
    # softmax of (200, 90, 50, 0) is (1, 0, 0, 0) in float32: 90 is still the second choice
    router = make_router(top_k=2).eval()
    with torch.no_grad():
        router.weight.zero_()
        router.weight[:, 0] = torch.tensor(logits)
    assert router(torch.ones(1, D)).indices.tolist() == [[logits.index(200), logits.index(90)]]


def test_noise_has_the_standard_deviation_of_the_paper():
    # sigma = 1 / E = 0.25 (with router_noise = 1); the difference of two log probabilities of
    # equal logits has sigma * sqrt(2) = 0.3536, known to 1 / sqrt(2 * 20000) = 0.5 %
    router = make_router(top_k=E)
    routing = router(torch.zeros(20000, D))
    probs = torch.empty_like(routing.weights).scatter(1, routing.indices, routing.weights)
    difference = probs[:, 0].log() - probs[:, 1].log()
    assert difference.std().item() == pytest.approx(math.sqrt(2) / E, rel=0.03)
    assert difference.mean().item() == pytest.approx(0, abs=0.01)


def test_losses_of_sigmoids_are_of_shares_of_their_sum():
    # (19): sigmoids of (0, log 3, -log 3, 0) are (1/2, 3/4, 1/4, 1/2), which sum to 2: shares are
    # (1/4, 3/8, 1/8, 1/4). E sum_i f_i P_i with the one choice, expert 1: 4 * 3/8 = 1.5; their
    # mean is 1/4, and their variance (0 + 1/64 + 1/64 + 0) / 4 = 1/128: over 1/16 it is 1/8
    weights = {'importance_weight': 1.0, 'balance_weight': 1.0}
    router = make_router(score='sigmoid', top_k=1, **weights, **SILENT)
    with torch.no_grad():
        router.weight[:, 0] = torch.tensor([0.0, math.log(3), -math.log(3), 0.0])
    routing = router(torch.eye(D)[:1])
    assert routing.weights.item() == pytest.approx(0.75)
    found = {name: loss.item() for name, loss in values_of(routing.losses).items()}
    assert found == pytest.approx({'importance': 0.125, 'balance': 1.5})


@pytest.mark.parametrize('score', ['softmax', 'sigmoid'])
def test_the_load_loss_is_of_the_chance_to_be_chosen(score):
    """(7) to (9) of logits, by which both scores are chosen: the same noise, the same loss."""
    router = make_router(score=score, importance_weight=0.0, load_weight=1.0)
    x = torch.randn(30, D)
    torch.manual_seed(0)
    found = values_of(router(x).losses)['load']
    torch.manual_seed(0)
    logits = x @ router.weight.t()
    noisy = logits + torch.randn_like(logits) / E
    bound = noisy.topk(2).values[:, -1:]
    chances = 0.5 + 0.5 * torch.erf((logits - bound) * E / 2**0.5)
    torch.testing.assert_close(found, losses.squared_variation(chances.sum(dim=0)))


@torch.no_grad()
def test_renormalized_sigmoids_that_round_to_zero_keep_their_ratio():
    # sigmoid(-200) is 0 in float32; of -200 and -200 - log 3 the shares are 3/4 and 1/4
    router = make_router(score='sigmoid', renormalize=True, **SILENT).eval()
    router.weight[:, 0] = torch.tensor([-300.0, -200 - math.log(3), -400.0, -200.0])
    routing = router(torch.eye(D)[:1])
    assert routing.indices.tolist() == [[3, 1]]
    torch.testing.assert_close(routing.weights, torch.tensor([[0.75, 0.25]]), rtol=1e-4, atol=0)


@pytest.mark.parametrize('capacity_factor', [None, 0.25])
def test_shared_experts_are_no_choice_and_no_load(make_layer, capacity_factor):
    net = make_layer('smoe', preset='shared', capacity_factor=capacity_factor)
    with collect_losses(net) as collected, record_layers(net) as records:
        net(torch.randn(4, 16, D))
    record, load = records['layer'], collected.stats['layer/load']
    chosen, _ = record.chosen['router']
    beside = record.experts['router'][..., 1][chosen[..., 0] >= 0]
    assert record.num_experts == E and beside.eq(E - 1).all()
    kept = chosen[chosen >= 0]
    torch.testing.assert_close(load, kept.bincount(minlength=E - 1) / len(kept))
    assert net.layer.experts_per_token == 2
    if capacity_factor:  # tokens without a chosen expert, whatever they share
        assert len(kept) <= 32
        assert collected.stats['layer/unrouted'].item() == pytest.approx(1 - len(kept) / 64)


def test_a_frozen_router_stays_one_in_a_model_that_is_unfrozen(make_layer):
    net = make_layer('smoe', preset='frozen', router_bias=True).requires_grad_(True)
    net(torch.randn(2, 5, D)).sum().backward()
    for name, parameter in net.named_parameters():
        assert (parameter.grad is None) == ('.router.' in name), name


# ceil(K T C / E) with E = 4: 2*10*1/4 = 5; 2*10*.5/4 = 2.5 -> 3; 9*1/4 = 2.25 -> 3; 1 -> 1
@cases(
    'num_tokens, top_k, factor, capacity', (10, 2, 1.0, 5), (10, 2, 0.5, 3), (9, 1, 1.0, 3),
    (1, 1, 0.1, 1),
)  # fmt: skip
def test_capacity_known_answers(num_tokens, top_k, factor, capacity):
    router = make_router(top_k=top_k, eval_capacity_factor=factor).eval()
    # all tokens are equal: the chosen experts take `capacity` of them, first come first served
    routing = router(torch.randn(1, D).expand(num_tokens, D))
    expected = torch.arange(num_tokens)[:, None].expand(-1, top_k) < capacity
    assert torch.equal(routing.kept, expected)


def test_the_router_starts_as_that_of_v_moe():
    torch.manual_seed(0)
    router = SMoERouter(128, SMoEConfig(num_experts=64))
    # 8192 draws of variance 1 / 128: the standard error of the spread is 0.8 %
    assert router.weight.std().item() == pytest.approx(128**-0.5, rel=0.03)
    # cut at two standard deviations of the uncut normal
    assert router.weight.abs().max() <= 2 * 128**-0.5 / 0.87962566
    # 8 logits of unit variance: measured on the authors' start, 0.35; 0.17 with a spread of 0.02
    probs = (torch.randn(2000, 128) @ router.weight[:8].t()).softmax(dim=-1)
    assert probs.max(dim=-1).values.mean().item() == pytest.approx(0.36, abs=0.03)
