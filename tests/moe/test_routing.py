"""Routing functions: top-k, weights, loads, and the places of a capacity against a naive queue."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from vqmoe_vision.moe import losses, routing
from vqmoe_vision.moe.codebooks.usage import random_choice, random_integers
from vqmoe_vision.moe.experts import Experts


def naive_capacity(indices, num_experts, capacity, priority=None):
    """Serve one assignment after the other, first choices first."""
    num_tokens, k = indices.shape
    order = list(range(num_tokens))
    if priority is not None:
        order.sort(key=lambda token: -priority[token].item())
    kept, taken = torch.zeros(num_tokens, k, dtype=torch.bool), [0] * num_experts
    for choice in range(k):
        for token in order:
            expert = indices[token, choice].item()
            kept[token, choice] = taken[expert] < capacity
            taken[expert] += 1
    return kept


@st.composite
def assignments(draw):
    """Distinct experts per token, a capacity, and maybe priorities (ties included)."""
    num_experts = draw(st.integers(1, 6))
    num_tokens = draw(st.integers(0, 20))
    k = draw(st.integers(1, num_experts))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    indices = torch.rand(num_tokens, num_experts, generator=generator).argsort(dim=1)[:, :k]
    if draw(st.booleans()):  # all tokens want the same
        indices = indices[:1].expand(num_tokens, k)
    priority = None
    if draw(st.booleans()):
        priority = torch.randint(0, 5, (num_tokens,), generator=generator) / 4
    return indices, num_experts, draw(st.integers(1, 25)), priority


@given(assignments())
def test_within_capacity_equals_the_naive_queue(case):
    assert torch.equal(routing.within_capacity(*case), naive_capacity(*case))


def test_top_1_takes_the_first_of_equals():
    _, indices = routing.top_k_experts(torch.zeros(5, 4), 1)
    assert indices.tolist() == [[0]] * 5


def test_expert_load_counts_what_is_kept():
    # of experts 0, 0, 1, 0, 3, 1 the first, third and last: 0, 1, 1
    kept = torch.tensor([[True, False], [True, False], [False, True]])
    load = routing.expert_load(torch.tensor([[0, 0], [1, 0], [3, 1]]), 4, kept)
    torch.testing.assert_close(load, torch.tensor([1, 2, 0, 0]) / 3)


@pytest.mark.parametrize('kept', [None, torch.zeros(0, 2, dtype=torch.bool)])
def test_expert_load_without_tokens_is_zero(kept):
    assert routing.expert_load(torch.zeros(0, 2, dtype=torch.int64), 3, kept).tolist() == [0, 0, 0]


def test_perplexities_of_many_along_a_dimension():
    # -(1/2 log2 1/2 + 2/4 log2 1/4) = 1.5 bits; all of one, none of the others: 0 bits
    shares = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]])
    assert routing.perplexities(shares, dim=1).tolist() == pytest.approx([2**1.5, 1])
    assert routing.perplexities(shares.T, dim=0).tolist() == pytest.approx([2**1.5, 1])


ROWS = torch.arange(2**16)


def mixed(value: int) -> int:
    """The mixing function in integers without bounds, as it is written for C's uint32."""
    value ^= value >> 16
    value = value * 0x21F0AAAD % 2**32
    value ^= value >> 15
    value = value * 0x735A2D97 % 2**32
    return value ^ value >> 15


def test_numbers_are_those_of_arithmetic_without_bounds():
    # two counters of which one has more than 32 bits
    stream = mixed((mixed((mixed(2) + 5) % 2**32) + 2**40 + 7) % 2**32)
    expected = [mixed((mixed(row) + stream) % 2**32) for row in range(1000)]
    assert random_integers(ROWS[:1000], 5, 2**40 + 7).tolist() == expected
    assert random_integers(ROWS[:1000], torch.tensor(5), 2**40 + 7).tolist() == expected


def test_choices_follow_their_weights():
    weights = torch.tensor([0.0, 1.0, 2.0, 0.0, 5.0, 1e-6])
    picks = random_choice(weights.expand(2**16, -1), torch.tensor(3))
    counts = torch.bincount(picks, minlength=6)
    assert counts[0] == counts[3] == 0 and counts[5] <= 2
    # 8192, 16384 and 40960, of standard deviations up to 124
    expected = torch.tensor([8192, 16384, 40960])
    assert (counts[[1, 2, 4]] - expected).abs().max() < 5 * 124


def test_every_expert_starts_with_the_spread_of_a_vit_layer():
    experts = Experts(8, 384, 512)
    for linear in (experts.fc1, experts.fc2):
        spread = linear.weight.flatten(1).std(dim=1)
        # 196608 draws: the standard error of a standard deviation is 0.02 / sqrt(2 n) = 3e-5
        torch.testing.assert_close(spread, torch.full((8,), 0.02), rtol=0, atol=2e-4)
        assert torch.equal(linear.bias, torch.zeros_like(linear.bias))


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
    noise = [[-37, 26, -18], [-74, 45, -15], [-67, -59, 73]]
    noise = torch.tensor(noise) / 1000
    normal = torch.distributions.Normal(0.0, 1.0)
    threshold = torch.tensor([[0.086], [0.225], [0.173]])
    chance = (1 - normal.cdf((threshold - logits) / 0.1)).mean(dim=0)
    by_hand = ((chance - chance.mean()) ** 2).mean() / chance.mean() ** 2
    value = losses.load(logits, logits + noise, noise_std=0.1, top_k=2).value()
    torch.testing.assert_close(value, by_hand)
    torch.testing.assert_close(value, torch.tensor(0.485738), rtol=0, atol=1e-6)


def test_router_z_of_zero_logits():
    # logsumexp of eight zeros = ln 8 = 2.0794; squared 4.3241
    assert losses.router_z(torch.zeros(5, 8)).item() == pytest.approx(4.3241, abs=5e-5)


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
    gates = torch.tensor([[0.2], [0.4], [0.6], [0.8]], requires_grad=True)
    value = losses.overload(gates, torch.tensor([[0], [0], [0], [1]]), 2).value()
    value.backward()
    assert value.item() == pytest.approx(0.05)
    # descent pushes busy experts down and idle ones up: excess / T = (+1/8, -1/8)
    torch.testing.assert_close(gates.grad, torch.tensor([[0.125]] * 3 + [[-0.125]]))
