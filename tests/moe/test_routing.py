"""Routing functions: top-k, weights, loads, and the places of a capacity against a naive queue."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from vqmoe_vision.moe import routing


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
