"""XMoE: cosine scores, temperatures, and what each gradient reaches."""

import pytest
import torch
import torch.nn.functional as F

from vqmoe_vision.moe import collect_losses
from vqmoe_vision.moe.methods.xmoe import XMoEConfig, XMoERouter

from ..by_hand import assert_by_hand, expert

D, E = 8, 4
gates = pytest.mark.parametrize('gate', ['softmax', 'sigmoid'])


def make_router(num_experts=E, **options):
    router = XMoERouter(D, XMoEConfig.from_options(num_experts=num_experts, **options))
    torch.nn.init.normal_(router.project)
    torch.nn.init.normal_(router.expert_embed)
    return router


@gates
@pytest.mark.parametrize('options', [{}, {'top_k': 2}, {'top_k': 2, 'renormalize': True}], ids=str)
def test_output_and_every_gradient(make_layer, gate, options):
    net = make_layer('xmoe', gate=gate, temperature=0.2, balance_weight=0.0, **options)
    router, k = net.layer.router, options.get('top_k', 1)

    def naive(x):
        """(5) and (6), one token after the other."""
        out = []
        for token in x.flatten(0, 1):
            near = router.project @ token
            scores = F.cosine_similarity(near[None], router.expert_embed, dim=-1) / 0.2
            gates = scores.softmax(dim=0) if gate == 'softmax' else scores.sigmoid()
            chosen = scores.argsort(descending=True)[:k]
            total = gates[chosen].sum() if 'renormalize' in options else 1.0
            out.append(sum(gates[e] / total * expert(net.layer.experts, e, token) for e in chosen))
        return torch.stack(out).view_as(x)

    # of tau the derivative is with respect to its logarithm, which the naive reading leaves out
    router.log_temperature.requires_grad_(False)
    assert_by_hand(net, naive, torch.randn(2, 7, D), rtol=1e-4, atol=1e-5)


def test_the_balance_loss_does_not_move_the_temperature(make_layer):
    layer = make_layer('xmoe', balance_weight=1.0)
    with collect_losses(layer) as collected:
        layer(torch.randn(2, 5, D))
        collected.total().backward()
    router = layer.layer.router
    assert router.log_temperature.grad is None
    assert router.project.grad.norm() > 1e-4
    assert router.expert_embed.grad.norm() > 1e-4


@pytest.mark.parametrize('temperature', [0.05, 2.0])
def test_balance_is_equation_8_whatever_the_gate_temperature(temperature):
    balance = dict(balance_temperature=0.5, balance_weight=2.0)
    router = make_router(temperature=temperature, top_k=2, **balance)
    x = torch.randn(20, D)
    routing = router(x)
    share = torch.bincount(routing.indices.flatten(), minlength=E) / 40
    probs = (router.scores(x) / 0.5).softmax(dim=-1).mean(dim=0)
    expected = 2.0 * E * (share * probs).sum()
    torch.testing.assert_close(routing.losses['balance'].value(), expected)


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
