"""SMoE against the equations of V-MoE, capacity included."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from vqmoe_vision.moe import collect_losses, losses
from vqmoe_vision.moe.losses import values_of
from vqmoe_vision.moe.methods.smoe import SMoEConfig, SMoERouter
from vqmoe_vision.moe.routing import renormalized

from ..naive_experts import naive

D, E = 8, 4


def make_router(**options):
    router = SMoERouter(D, SMoEConfig.from_options(num_experts=E, **options))
    torch.nn.init.normal_(router.weight, std=0.5)
    return router


def expert(experts, e, x):
    """Answer of expert e for all tokens."""
    hidden = F.gelu(F.linear(x, experts.fc1.weight[e], experts.fc1.bias[e]))
    return F.linear(hidden, experts.fc2.weight[e], experts.fc2.bias[e])


@pytest.mark.parametrize('top_k', [1, 2, 4])
def test_weights_are_the_largest_softmax_probabilities(top_k):
    router, x = make_router(top_k=top_k).eval(), torch.randn(20, D)
    routing = router(x)
    probs = (x @ router.weight.t()).softmax(dim=-1)
    expected = probs.sort(dim=-1, descending=True)
    torch.testing.assert_close(routing.weights, expected.values[:, :top_k])
    assert torch.equal(routing.indices, expected.indices[:, :top_k])
    total = routing.weights.sum(dim=-1)
    if top_k == E:
        torch.testing.assert_close(total, torch.ones(20))
    else:
        assert (total < 1).all()


@pytest.mark.parametrize('top_k', [2, 4])
def test_renormalized_weights_are_softmax_of_the_chosen_logits(top_k):
    router, x = make_router(top_k=top_k, renormalize=True).eval(), torch.randn(20, D)
    routing = router(x)
    chosen = (x @ router.weight.t()).gather(1, routing.indices)
    torch.testing.assert_close(routing.weights, chosen.softmax(dim=-1))
    torch.testing.assert_close(routing.weights.sum(dim=-1), torch.ones(20))


def test_all_experts_renormalized_are_the_dense_mixture(make_layer):
    layer, x = make_layer('smoe', top_k=E, renormalize=True).eval(), torch.randn(3, 5, D)
    probs = (x @ layer.layer.router.weight.t()).softmax(dim=-1)
    answers = torch.stack([expert(layer.layer.experts, e, x) for e in range(E)])
    expected = torch.einsum('bne,ebnd->bnd', probs, answers)
    torch.testing.assert_close(layer(x), expected)


def test_one_expert_is_the_dense_mlp(make_layer):
    layer, x = make_layer('smoe', num_experts=1, top_k=1), torch.randn(3, 5, D)
    for training in (True, False):
        out = layer.train(training)(x)
        torch.testing.assert_close(out, expert(layer.layer.experts, 0, x))


@pytest.mark.parametrize('logits', list(itertools.permutations([200.0, 90.0, 50.0, 0.0])))
def test_choices_follow_the_logits_where_probabilities_underflow(logits):
    # softmax of (200, 90, 50, 0) is (1, 0, 0, 0) in float32: 90 is still the second choice
    router = make_router(top_k=2).eval()
    with torch.no_grad():
        router.weight.zero_()
        router.weight[:, 0] = torch.tensor(logits)
    assert router(torch.ones(1, D)).indices.tolist() == [[logits.index(200), logits.index(90)]]


# --- noise


def test_noise_has_the_standard_deviation_of_the_paper():
    # sigma = 1 / E = 0.25 (with router_noise = 1); the difference of two log probabilities of
    # equal logits has sigma * sqrt(2) = 0.3536, known to 1 / sqrt(2 * 20000) = 0.5 %
    router = make_router(top_k=E)
    routing = router(torch.zeros(20000, D))
    probs = torch.empty_like(routing.weights).scatter(1, routing.indices, routing.weights)
    difference = probs[:, 0].log() - probs[:, 1].log()
    assert difference.std().item() == pytest.approx(math.sqrt(2) / E, rel=0.03)
    assert difference.mean().item() == pytest.approx(0, abs=0.01)


def test_noise_is_drawn_only_while_training():
    router, x = make_router(), torch.randn(20, D)
    assert not torch.equal(router(x).weights, router(x).weights)
    router.eval()
    assert torch.equal(router(x).weights, router(x).weights)
    silent = make_router(router_noise=0.0, load_weight=0.0)
    assert torch.equal(silent(x).weights, silent(x).weights)


def test_importance_is_free_of_noise_and_load_is_not():
    router, x = make_router(), torch.randn(20, D)
    first, second = values_of(router(x).losses), values_of(router(x).losses)
    assert torch.equal(first['importance'], second['importance'])
    assert not torch.equal(first['load'], second['load'])


# --- losses


def test_losses_are_the_weighted_functions():
    weights = {'importance': 0.1, 'balance': 0.3, 'z': 0.4}
    options = {f'{name}_weight': value for name, value in weights.items()}
    router = make_router(router_noise=0.0, load_weight=0.0, **options)
    x = torch.randn(20, D)
    routing, logits = router(x), x @ router.weight.t()
    probs = logits.softmax(dim=-1)
    expected = {
        'importance': 0.1 * losses.importance(probs).value(),
        'balance': 0.3 * losses.load_balance(probs, routing.indices).value(),
        'z': 0.4 * losses.router_z(logits),
    }
    torch.testing.assert_close(values_of(routing.losses), expected)


def test_the_load_loss_sees_the_noise_of_the_routing():
    router, x = make_router(load_weight=2.0), torch.randn(20, D)
    torch.manual_seed(3)
    actual = router(x).losses['load'].value()
    torch.manual_seed(3)
    logits = x @ router.weight.t()
    noisy = logits + torch.randn_like(logits) / E
    torch.testing.assert_close(actual, 2.0 * losses.load(logits, noisy, 1 / E, top_k=2).value())


def test_the_default_losses_are_those_of_the_paper():
    assert set(make_router()(torch.randn(5, D)).losses) == {'importance', 'load'}
    assert make_router(preset='group')(torch.randn(5, D)).losses == {}


def test_eval_has_no_losses():
    assert make_router(balance_weight=1.0).eval()(torch.randn(5, D)).losses == {}


# --- what the router learns from


@pytest.mark.parametrize(('top_k', 'renormalize'), [(1, False), (2, False), (2, True)])
def test_the_task_moves_the_router(make_layer, top_k, renormalize):
    layer = make_layer('smoe', top_k=top_k, renormalize=renormalize)
    layer(torch.randn(2, 5, D)).square().sum().backward()
    assert layer.layer.router.weight.grad.norm() > 1e-3


def test_one_renormalized_weight_would_have_no_gradient():
    # why renormalize=True with top_k=1 is refused
    logits = torch.randn(5, E, requires_grad=True)
    weights = renormalized(logits.softmax(dim=-1).max(dim=-1, keepdim=True).values)
    weights.square().sum().backward()
    assert torch.equal(weights, torch.ones(5, 1))
    torch.testing.assert_close(logits.grad, torch.zeros(5, E))


def test_auxiliary_losses_move_the_router_alone(make_layer):
    layer = make_layer('smoe', balance_weight=1.0, z_weight=1.0)
    with collect_losses(layer) as collected:
        layer(torch.randn(2, 5, D))
        collected.total().backward()
    grads = {name: p.grad for name, p in layer.layer.named_parameters()}
    assert grads.pop('router.weight').norm() > 1e-3
    assert set(grads.values()) == {None}


def test_a_frozen_router_stays_one_in_a_model_that_is_unfrozen(make_layer):
    net = make_layer('smoe', preset='frozen', router_bias=True).requires_grad_(True)
    net(torch.randn(2, 5, D)).sum().backward()
    for name, parameter in net.named_parameters():
        assert (parameter.grad is None) == ('.router.' in name), name


def test_group_preset_is_a_biased_softmax_over_two():
    router, x = make_router(preset='group'), torch.randn(20, D)
    torch.nn.init.normal_(router.bias)
    logits = F.linear(x, router.weight, router.bias)
    expected = logits.topk(2, dim=-1)
    routing = router(x)
    assert torch.equal(routing.indices, expected.indices)
    torch.testing.assert_close(routing.weights, expected.values.softmax(dim=-1))


# --- capacity


@pytest.mark.parametrize(
    ('num_tokens', 'top_k', 'factor', 'capacity'),
    # ceil(K T C / E) with E = 4: 2*10*1/4 = 5; 2*10*.5/4 = 2.5 -> 3; 9*1/4 = 2.25 -> 3; 1 -> 1
    [(10, 2, 1.0, 5), (10, 2, 0.5, 3), (9, 1, 1.0, 3), (1, 1, 0.1, 1)],
)
def test_capacity_known_answers(num_tokens, top_k, factor, capacity):
    router = make_router(top_k=top_k, eval_capacity_factor=factor).eval()
    # all tokens are equal: the chosen experts take `capacity` of them, first come first served
    routing = router(torch.randn(1, D).expand(num_tokens, D))
    expected = torch.arange(num_tokens)[:, None].expand(-1, top_k) < capacity
    assert torch.equal(routing.kept, expected)


def test_training_and_eval_have_capacities_of_their_own():
    x = torch.randn(1, D).expand(8, D)
    router = make_router(top_k=1, capacity_factor=1.0, eval_capacity_factor=2.0, router_noise=1e-6)
    assert router(x).kept.sum() == 2
    assert router.eval()(x).kept.sum() == 4
    dropless_eval = make_router(capacity_factor=1.0)
    assert dropless_eval(x).kept is not None
    assert dropless_eval.eval()(x).kept is None


@pytest.mark.parametrize('factor', [float(E), 1e30])
@pytest.mark.parametrize('batch_prioritized', [True, False])
def test_capacity_for_everybody_equals_dropless(make_layer, batch_prioritized, factor):
    options = {'eval_capacity_factor': factor, 'batch_prioritized': batch_prioritized}
    capped, dropless = make_layer('smoe', **options).eval(), make_layer('smoe').eval()
    dropless.load_state_dict(capped.state_dict())
    x = torch.randn(3, 5, D)
    assert torch.equal(capped(x), dropless(x))


def test_dropped_tokens_give_zero(make_layer):
    layer = make_layer('smoe', top_k=1, eval_capacity_factor=1.0).eval()
    out = layer(torch.randn(1, 1, D).expand(1, 8, D))[0]
    # 8 equal tokens, two places
    assert (out[:2] != 0).all()
    assert torch.equal(out[2:], torch.zeros(6, D))


def test_kept_weights_are_those_before_dropping(make_layer):
    layer = make_layer('smoe', renormalize=True, eval_capacity_factor=0.5).eval()
    x = torch.randn(1, 12, D)
    routing = layer.layer.router(x[0])
    assert not routing.kept.all()
    torch.testing.assert_close(routing.weights.sum(dim=-1), torch.ones(12))
    expected = naive(layer.layer.experts, x[0], routing)
    torch.testing.assert_close(layer(x)[0], expected)


def test_prioritized_routing_drops_exactly_the_tokens_with_the_least_weight():
    router = make_router(top_k=1, eval_capacity_factor=1.0, batch_prioritized=True).eval()
    with torch.no_grad():
        router.weight.zero_()
        router.weight[2, 0] = 1.0
    x = torch.rand(12, D) + 0.5  # all go to expert 2, with weights that grow with x[:, 0]
    kept = router(x).kept[:, 0]
    assert kept.sum() == 3
    assert x[kept, 0].min() > x[~kept, 0].max()


def test_prioritized_capacity_is_equivariant_under_token_permutation(make_layer):
    layer = make_layer('smoe', eval_capacity_factor=0.5, batch_prioritized=True).eval()
    x, shuffle = torch.randn(1, 12, D), torch.randperm(12)
    torch.testing.assert_close(layer(x[:, shuffle]), layer(x)[:, shuffle])


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


def test_a_smaller_start_is_that_of_switch_transformers():
    config = SMoEConfig(num_experts=64, router_init_scale=0.1)
    weight = SMoERouter(128, config).weight
    # sqrt(0.1 / 128) = 0.02795; of 8,192 draws the spread is known to 0.8 %, four times that is 3 %
    assert weight.std().item() == pytest.approx(math.sqrt(0.1 / 128), rel=0.03)


@pytest.mark.parametrize('scale', [0.0, 9e-7, 1.1e4, -0.1, math.inf, math.nan])
def test_a_start_out_of_range_is_refused(scale):
    with pytest.raises(ValueError, match=r'router_init_scale=.* is not possible: from 1e-6 to 1e4'):
        SMoEConfig(router_init_scale=scale)


def test_statistics_count_what_the_capacity_leaves(make_layer):
    net = make_layer('smoe', top_k=1, capacity_factor=0.25)
    x = torch.randn(4, 32, D)
    with collect_losses(net) as collected:
        torch.manual_seed(0)
        net(x)
        torch.manual_seed(0)  # the same noise
        routing = net.layer.router(x.flatten(0, 1))
    kept = routing.kept[:, 0]
    assert kept.float().mean() < 0.5
    load = routing.indices[routing.kept].bincount(minlength=E) / kept.sum()
    torch.testing.assert_close(collected.stats['layer/load'], load)
    assert collected.stats['layer/unrouted'].item() == pytest.approx(1 - kept.float().mean().item())
