"""Expert choice against a plain reading of its equations, expert by expert."""

import pytest
import torch

from vqmoe_vision.moe import collect_losses
from vqmoe_vision.moe.methods.ecmoe import ExpertChoiceConfig, ExpertChoiceRouter
from vqmoe_vision.moe.raw_patches import Host

from ..by_hand import assert_by_hand, expert

D, E = 8, 4


def naive(layer, x):
    """(1) to (3) for images (B, N, D), one expert after the other."""
    out = [[torch.zeros(D) for _ in image] for image in x]
    for b, image in enumerate(x):
        scores = (image @ layer.router.weight.t()).softmax(dim=1)
        count = max(round(len(image) * layer.router.config.capacity_factor / E), 1)
        for e in range(E):
            for t in scores[:, e].argsort(descending=True)[:count]:
                out[b][t] = out[b][t] + scores[t, e] * expert(layer.experts, e, image[t])
    return torch.stack([torch.stack(rows) for rows in out])


@pytest.mark.parametrize('capacity_factor', [0.1, 1.0, 2.0, 4.0])
@pytest.mark.parametrize('num_tokens', [1, 6, 17])
def test_output_and_every_gradient(make_layer, capacity_factor, num_tokens):
    net = make_layer('ecmoe', capacity_factor=capacity_factor)
    assert_by_hand(net, lambda x: naive(net.layer, x), torch.randn(3, num_tokens, D))


def test_known_choices(make_layer):
    # Two experts of capacity 1 take 2 of 4 tokens each, those with the largest probability for
    # them. Logits (v, 0): the first expert prefers large v, the second small.
    net = make_layer('ecmoe', num_experts=2, capacity_factor=1.0)
    with torch.no_grad():
        net.layer.router.weight.zero_()
        net.layer.router.weight[0, 0] = 1.0
    x = torch.zeros(1, 4, D)
    x[0, :, 0] = torch.tensor([0.0, 3.0, -1.0, 2.0])
    routing = net.layer.router(x)
    assert routing.indices.tolist() == [0, 0, 1, 1]
    assert routing.tokens.tolist() == [1, 3, 2, 0]
    # sigmoid(3), sigmoid(2), sigmoid(1), sigmoid(0)
    expected = torch.tensor([0.952574, 0.880797, 0.731059, 0.5])
    torch.testing.assert_close(routing.weights, expected, rtol=0, atol=1e-6)


def test_tokens_without_an_expert_give_zero_and_are_counted(make_layer):
    net, x = make_layer('ecmoe', capacity_factor=0.5), torch.randn(3, 20, D)
    with collect_losses(net) as collected:
        out = net(x).flatten(0, 1)
    served = torch.zeros(60, dtype=torch.bool)
    served[net.layer.router(x).tokens] = True
    assert torch.equal(out[~served], torch.zeros_like(out[~served]))
    assert (out[served].abs().sum(dim=1) > 0).all()
    # at most 10 of 20 tokens find a place
    share = collected.stats['layer/unrouted'].item()
    assert share == pytest.approx(1 - served.float().mean().item()) and share >= 0.5


# capacities by (2): round(17 * 2 / 8) = 4, round(17 * 1.25 / 8) = 3, at least one of round(0.53)
@pytest.mark.parametrize(
    'num_experts, factor, expected', [(8, 2.0, 32 / 17), (8, 1.25, 24 / 17), (64, 2.0, 64 / 17)]
)
def test_experts_per_token_are_those_that_compute(num_experts, factor, expected):
    config = ExpertChoiceConfig(num_experts=num_experts, capacity_factor=factor)
    router = ExpertChoiceRouter(D, config, Host(17))
    assert router.experts_per_token == pytest.approx(expected)
    assert len(router(torch.randn(3, 17, D)).tokens) == pytest.approx(3 * 17 * expected)
