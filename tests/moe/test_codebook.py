"""Codebooks: nearest codes, the terms of the loss, what changes when, and moving averages."""

import copy

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from vqmoe_vision.moe.codebooks import nearest_code
from vqmoe_vision.moe.codebooks.ema import CODEBOOKS

from .codebooks import M, every_codebook, learn, make, same, state
from .conftest import D

# --- nearest code


@given(st.integers(0, 30), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31))
def test_nearest_code_is_the_argmin_of_distances(num_tokens, num_codes, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, dim, generator=generator)
    codes = torch.randn(num_codes, dim, generator=generator)
    distances = (x[:, None] - codes[None]).square().sum(dim=-1)
    chosen = distances.gather(1, nearest_code(x, codes)[:, None])[:, 0]
    # another code may be equally near up to rounding
    torch.testing.assert_close(chosen, distances.min(dim=1).values, rtol=1e-4, atol=1e-5)


# --- the two terms of the loss


@every_codebook
def test_loss_known_answer(name):
    # one code (3, 4) + one token (0, 0), D = 2: mean square (9 + 16) / 2 = 12.5
    # both terms: 12.5 * (1 + 0.25) = 15.625; without the codebook term: 12.5 * 0.25 = 3.125
    loss = make(name, torch.tensor([[3.0, 4.0]]))(torch.zeros(1, 2)).loss
    assert loss.item() == (3.125 if name == 'ema' else 15.625)


@every_codebook
@pytest.mark.parametrize('beta', [0.0, 0.25, 2.0])
def test_commitment_moves_only_tokens_and_scales_with_beta(name, beta):
    book, x = make(name, commitment=beta), torch.randn(20, D, requires_grad=True)
    quantized = book(x)
    quantized.loss.backward()
    # d/dx of beta * mean (x - v)^2
    expected = beta * 2 * (x - quantized.codes).detach() / x.numel()
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize('name', ['plain', 'cvq'])
@pytest.mark.parametrize('beta', [0.0, 0.25, 2.0])
def test_codebook_term_moves_only_selected_codes_and_ignores_beta(name, beta):
    book, x = make(name, commitment=beta), torch.randn(20, D, requires_grad=True)
    with torch.no_grad():
        book.embed[2] = 100.0  # never selected
    quantized = book(x)
    quantized.loss.backward()
    one_hot = torch.nn.functional.one_hot(quantized.indices, M).float()
    expected = one_hot.t() @ (2 * (quantized.codes - x) / x.numel()).detach()
    torch.testing.assert_close(book.embed.grad, expected)
    assert torch.equal(book.embed.grad[2], torch.zeros(D))


@every_codebook
@pytest.mark.parametrize('started', [True, False], ids=['started', 'before the start'])
def test_codes_learn_in_float32_under_autocast(name, started):
    torch.manual_seed(0)
    book = make(name) if started else CODEBOOKS[name](M, D)
    other = copy.deepcopy(book)
    for _ in range(2):
        x = 3 * torch.randn(500, D) + 20  # a common mean, of which little is left in bfloat16
        indices = book(x).indices
        learn(book, x, indices)
        with torch.autocast('cpu', torch.bfloat16):
            other.observe(x, indices)
            other.update()
    assert same(state(other), book.state_dict())


# --- what changes when


@pytest.mark.parametrize('name', ['ema', 'cvq'])
def test_passes_are_averaged(name):
    joint = make(name)
    # each code has its seven tokens: what CVQ draws for a code of few depends on the passes
    x = joint.codes().detach().repeat(7, 1) + 0.1 * torch.randn(7 * M, D)
    parts = copy.deepcopy(joint)
    joint.observe(x, joint(x).indices)
    for half in x.chunk(2):
        parts.observe(half, parts(half).indices)
    joint.update()
    parts.update()
    assert parts.pending is None
    # CVQ moves a code of 1 / M by exp(-10) of the way to an anchor, which is another token
    tolerance = 1e-3 if name == 'cvq' else 1e-5
    for key, value in joint.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[key], value, rtol=1e-5, atol=tolerance)


# --- moving averages


def test_ema_follows_the_recursion_in_numpy():
    book = make('ema')
    gamma, eps = 0.99, 1e-5
    codes = book.codes().double().numpy()
    # the start counts as even usage by the 64 tokens of a pass
    n, m = np.full(M, 64 / M), 64 * codes / M
    for _ in range(30):
        x = torch.randn(64, D) + 0.5
        tokens = x.double().numpy()
        nearest = ((tokens[:, None] - codes[None]) ** 2).sum(-1).argmin(1)
        assert np.array_equal(learn(book, x).indices.numpy(), nearest)
        one_hot = np.eye(M)[nearest]
        n = gamma * n + (1 - gamma) * one_hot.sum(0)
        m = gamma * m + (1 - gamma) * one_hot.T @ tokens
        codes = m / ((n + eps) / (n.sum() + M * eps) * n.sum())[:, None]
        np.testing.assert_allclose(book.codes().numpy(), codes, rtol=0, atol=1e-5)
