"""Known answers of the auxiliary losses, their extremes and their gradients."""

import math

import pytest
import torch

from vqmoe_vision.moe import losses

# rows sum to 1; from the unit tests of google-research/vmoe, arithmetic redone below
GATES = torch.tensor([[0.5, 0.4, 0.1], [0.3, 0.3, 0.4], [0.1, 0.2, 0.7], [0.8, 0.2, 0.0]])


def test_load_balance_known_answer():
    # argmax 0, 2, 2, 0: f = (1/2, 0, 1/2); P = (1.7, 1.1, 1.2) / 4
    # 3 * (1/2 * 1.7 / 4 + 1/2 * 1.2 / 4) = 3 * 2.9 / 8 = 1.0875
    value = losses.load_balance(GATES, GATES.argmax(dim=1, keepdim=True)).value()
    torch.testing.assert_close(value, torch.tensor(1.0875))


def test_importance_known_answer():
    # sums (1.7, 1.1, 1.2), mean 4/3, deviations (11, -7, -4) / 30
    # var = (121 + 49 + 16) / 900 / 3 = 0.0688889; over (4/3)^2 = 1.7777778: 0.03875
    torch.testing.assert_close(losses.importance(GATES).value(), torch.tensor(0.03875))


def test_load_known_answer():
    # vmoe's oracle: noisy = logits + noise; threshold = 2nd largest noisy logit
    # = (.086, .225, .173); chances = 1 - Phi((threshold - logit) / .1), mean over tokens, then
    # var / mean^2 = 0.485738
    logits = torch.tensor([[0.9, 0.06, 0.04], [0.7, 0.18, 0.12], [0.85, 0.05, 0.1]])
    noise = torch.tensor(
        [[-0.037, 0.026, -0.018], [-0.074, 0.045, -0.015], [-0.067, -0.059, 0.073]]
    )
    normal = torch.distributions.Normal(0.0, 1.0)
    threshold = torch.tensor([[0.086], [0.225], [0.173]])
    chance = (1 - normal.cdf((threshold - logits) / 0.1)).mean(dim=0)
    by_hand = ((chance - chance.mean()) ** 2).mean() / chance.mean() ** 2
    value = losses.load(logits, logits + noise, noise_std=0.1, top_k=2).value()
    torch.testing.assert_close(value, by_hand)
    torch.testing.assert_close(value, torch.tensor(0.485738), rtol=0, atol=1e-6)


def test_router_z_of_zero_logits():
    # logsumexp of eight zeros = ln 8 = 2.0794; squared 4.3241
    value = losses.router_z(torch.zeros(5, 8))
    torch.testing.assert_close(value, torch.tensor(math.log(8) ** 2))
    torch.testing.assert_close(value, torch.tensor(4.3241), rtol=0, atol=5e-5)


def test_diversity_known_answer():
    # means (1.7, 1.1, 1.2) / 4: ln 3 + 0.425 ln 0.425 + 0.275 ln 0.275 + 0.3 ln 0.3
    # = 1.0986123 - 0.3636581 - 0.3550206 - 0.3611918 = 0.0187417
    value = losses.diversity(GATES).value()
    torch.testing.assert_close(value, torch.tensor(0.0187417), rtol=0, atol=1e-6)


@pytest.mark.parametrize('top_k', [1, 2, 4])
def test_load_balance_is_one_at_even_routing(top_k):
    num_experts, tokens = 8, 16
    first = torch.arange(tokens) % num_experts
    indices = torch.stack([(first + i) % num_experts for i in range(top_k)], dim=1)
    probs = torch.full((tokens, num_experts), 1 / num_experts)
    torch.testing.assert_close(losses.load_balance(probs, indices).value(), torch.tensor(1.0))


def test_load_balance_gradient_is_the_load():
    # d loss / d probs[t, i] = E * f_i / T: nothing comes through f
    probs = torch.rand(6, 3).softmax(dim=-1).requires_grad_()
    indices = torch.tensor([[0], [0], [0], [1], [1], [2]])
    losses.load_balance(probs, indices).value().backward()
    share = torch.tensor([3, 2, 1]) / 6
    torch.testing.assert_close(probs.grad, (3 * share / 6).expand(6, 3))


def test_squared_variation_is_differentiable_at_exact_balance():
    values = torch.full((4,), 2.5, requires_grad=True)
    loss = losses.squared_variation(values)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(values.grad, torch.zeros(4))


def test_overload_known_answer():
    # T = 4, E = 2, counts (3, 1), n = 2: excess (1/2, -1/2)
    # (0.5 * (0.2 + 0.4 + 0.6) - 0.5 * 0.8) / 4 = 0.2 / 4 = 0.05
    gates = torch.tensor([[0.2], [0.4], [0.6], [0.8]])
    indices = torch.tensor([[0], [0], [0], [1]])
    torch.testing.assert_close(losses.overload(gates, indices, 2).value(), torch.tensor(0.05))


def test_overload_pushes_busy_experts_down_and_idle_ones_up():
    gates = torch.full((4, 1), 0.5, requires_grad=True)
    indices = torch.tensor([[0], [0], [0], [1]])
    losses.overload(gates, indices, 2).value().backward()
    # descent follows -grad: excess / T = (+1/8, -1/8)
    torch.testing.assert_close(gates.grad, torch.tensor([[0.125], [0.125], [0.125], [-0.125]]))
