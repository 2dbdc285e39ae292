"""XMoE: cosine scores, temperatures, and what each gradient reaches."""

import pytest
import torch
import torch.nn.functional as F

from vqmoe_vision.moe import collect_losses, losses
from vqmoe_vision.moe.methods.xmoe import XMoEConfig, XMoERouter

D, E = 8, 4
gates = pytest.mark.parametrize('gate', ['softmax', 'sigmoid'])


def make_router(num_experts=E, **options):
    router = XMoERouter(D, XMoEConfig.from_options(num_experts=num_experts, **options))
    torch.nn.init.normal_(router.project)
    torch.nn.init.normal_(router.expert_embed)
    return router


def test_scores_are_cosines():
    router, x = make_router(), torch.randn(20, D)
    tokens = x @ router.project.t()
    expected = F.cosine_similarity(tokens[:, None], router.expert_embed[None], dim=-1)
    scores = router.scores(x)
    torch.testing.assert_close(scores, expected)
    assert scores.abs().max() <= 1 + 1e-6


def test_scores_ignore_the_lengths_of_tokens_and_experts():
    router, x = make_router(), torch.randn(20, D)
    scores = router.scores(x)
    torch.testing.assert_close(router.scores(x * 7), scores)
    with torch.no_grad():
        router.expert_embed *= torch.tensor([[0.5], [3.0], [20.0], [1.0]])
    torch.testing.assert_close(router.scores(x), scores)


def test_gradients_have_no_radial_part():
    router, x = make_router(), torch.randn(20, D, requires_grad=True)
    (router.scores(x) * torch.randn(20, E)).sum().backward()
    for tensor in (x, router.expert_embed):
        along = (tensor * tensor.grad).sum(dim=-1)
        assert tensor.grad.norm() > 0.1
        # of terms of size one, in float32
        torch.testing.assert_close(along, torch.zeros_like(along), rtol=0, atol=2e-6)


@gates
@pytest.mark.parametrize('top_k', [1, 2])
@pytest.mark.parametrize('temperature', [1e-3, 0.01, 0.07, 0.3, 1.0, 100.0])
def test_the_choice_does_not_depend_on_the_temperature(gate, top_k, temperature):
    router = make_router(gate=gate, top_k=top_k, temperature=temperature)
    x = torch.randn(500, D)
    assert torch.equal(router(x).indices, router.scores(x).topk(top_k, dim=-1).indices)


@gates
@pytest.mark.parametrize('top_k', [1, 2])
def test_weights_are_equation_6(gate, top_k):
    router, x = make_router(gate=gate, top_k=top_k, temperature=0.2), torch.randn(20, D)
    scaled = router.scores(x) / 0.2
    expected = scaled.softmax(dim=-1) if gate == 'softmax' else scaled.sigmoid()
    routing = router(x)
    torch.testing.assert_close(routing.weights, expected.gather(1, routing.indices))


def test_weights_tend_to_one_and_to_an_even_share():
    x = torch.randn(20, D)
    cold, hot = make_router(temperature=1e-4), make_router(temperature=1e6)
    scores = cold.scores(x).topk(2, dim=-1).values
    clear = scores[:, 0] - scores[:, 1] > 0.01  # a hundred temperatures apart
    assert clear.sum() > 10
    torch.testing.assert_close(cold(x).weights[clear], torch.ones(int(clear.sum()), 1))
    torch.testing.assert_close(hot(x).weights, torch.full((20, 1), 1 / E))
    tepid = make_router(temperature=1e6, gate='sigmoid')
    torch.testing.assert_close(tepid(x).weights, torch.full((20, 1), 0.5))


@pytest.mark.parametrize(
    ('gate', 'start', 'balance'), [('softmax', 0.3, 0.3), ('sigmoid', 0.07, 0.07)]
)
def test_temperatures_start_as_in_the_paper(gate, start, balance):
    router = XMoERouter(D, XMoEConfig(num_experts=E, gate=gate))
    assert router.log_temperature.exp().item() == pytest.approx(start)
    assert router.balance_temperature == balance


@pytest.mark.parametrize(('num_experts', 'dim'), [(2, 2), (4, 2), (8, 4), (32, 16)])
def test_the_sphere_has_half_as_many_dimensions_as_experts(num_experts, dim):
    router = XMoERouter(D, XMoEConfig(num_experts=num_experts))
    assert router.project.shape == (dim, D)
    assert router.expert_embed.shape == (num_experts, dim)


def test_the_task_moves_every_router_parameter(make_layer):
    layer = make_layer('xmoe')
    layer(torch.randn(2, 5, D)).square().sum().backward()
    router = layer.layer.router
    for parameter in (router.log_temperature, router.project, router.expert_embed):
        assert parameter.grad.abs().max() > 1e-4


def test_the_balance_loss_does_not_move_the_temperature(make_layer):
    layer = make_layer('xmoe', balance_weight=1.0)
    with collect_losses(layer) as collected:
        layer(torch.randn(2, 5, D))
        collected.total().backward()
    router = layer.layer.router
    assert router.log_temperature.grad is None
    assert router.project.grad.norm() > 1e-4
    assert router.expert_embed.grad.norm() > 1e-4


def test_the_balance_temperature_is_no_parameter():
    names = {name for name, _ in make_router().named_parameters()}
    assert names == {'project', 'expert_embed', 'log_temperature'}


@pytest.mark.parametrize('temperature', [0.05, 2.0])
def test_balance_is_equation_8_whatever_the_gate_temperature(temperature):
    router = make_router(
        temperature=temperature, balance_temperature=0.5, balance_weight=2.0, top_k=2
    )
    x = torch.randn(20, D)
    routing = router(x)
    share = torch.bincount(routing.indices.flatten(), minlength=E) / 40
    probs = (router.scores(x) / 0.5).softmax(dim=-1).mean(dim=0)
    expected = 2.0 * E * (share * probs).sum()
    torch.testing.assert_close(routing.losses['balance'].value(), expected)
    balance = losses.load_balance((router.scores(x) / 0.5).softmax(-1), routing.indices)
    torch.testing.assert_close(expected, 2.0 * balance.value())


def test_a_fixed_temperature_is_a_buffer():
    router = make_router(learn_temperature=False)
    assert 'log_temperature' in dict(router.named_buffers())


def test_zero_tokens_have_finite_scores_and_gradients():
    router, x = make_router(), torch.zeros(3, D, requires_grad=True)
    scores = router.scores(x)
    scores.sum().backward()
    assert torch.equal(scores, torch.zeros(3, E))
    assert x.grad.isfinite().all()
    assert router.project.grad.isfinite().all()


def test_group_preset_normalises_experts_only():
    router, x = make_router(preset='group'), torch.randn(20, D)
    assert router.project.shape == (8, D)
    scores = (x @ router.project.t()) @ F.normalize(router.expert_embed, dim=-1).t()
    expected = scores.topk(2, dim=-1)
    routing = router(x)
    assert torch.equal(routing.indices, expected.indices)
    torch.testing.assert_close(routing.weights, expected.values.softmax(dim=-1))
    assert routing.losses == {}


@pytest.mark.parametrize('num_experts', [4, 8, 32])
def test_expert_embeddings_start_with_the_length_of_the_authors_code(num_experts):
    router = XMoERouter(D, XMoEConfig(num_experts=num_experts))
    lengths = router.expert_embed.norm(dim=-1)
    torch.testing.assert_close(lengths, torch.full((num_experts,), 1.5))


def test_renormalised_sigmoid_gates_stay_finite_at_a_small_temperature():
    options = {'gate': 'sigmoid', 'renormalize': True, 'temperature': 0.005, 'top_k': E}
    router = make_router(**options)
    # cosines of -1 and -0.9 over 0.005: both gates are below the least float32
    scores = torch.tensor([[-1.0, -0.9]]).repeat(1, E // 2).requires_grad_()
    weights = router._weights(scores / 0.005, torch.arange(E)[None])
    weights.square().sum().backward()
    assert weights.isfinite().all() and scores.grad.isfinite().all()
    # ratios of the gates: exp((-0.9 + 1) / 0.005) = exp(20) to one, shared by E / 2
    torch.testing.assert_close(weights[0, 1::2], torch.full((E // 2,), 2 / E))
