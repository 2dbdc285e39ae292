"""Codebooks: nearest codes, the terms of the loss, what changes when, and moving averages."""

import copy

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from vqmoe_vision.moe.codebooks import nearest_code, rotate_to
from vqmoe_vision.moe.codebooks.ema import CODEBOOKS, UsageCodebook
from vqmoe_vision.moe.methods.vqmoe import Quantizer, VQMoEConfig

from .codebooks import M, every_codebook, learn, make, same, state
from .conftest import D


@given(st.integers(0, 30), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31))
def test_nearest_code_is_the_argmin_of_distances(num_tokens, num_codes, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, dim, generator=generator)
    codes = torch.randn(num_codes, dim, generator=generator)
    distances = (x[:, None] - codes[None]).square().sum(dim=-1)
    chosen = distances.gather(1, nearest_code(x, codes)[:, None])[:, 0]
    # another code may be equally near up to rounding
    torch.testing.assert_close(chosen, distances.min(dim=1).values, rtol=1e-4, atol=1e-5)


@every_codebook
def test_loss_known_answer(name):
    # one code (3, 4) + one token (0, 0), D = 2: mean square (9 + 16) / 2 = 12.5
    # both terms: 12.5 * (1 + 0.25) = 15.625; without the codebook term: 12.5 * 0.25 = 3.125
    loss = make(name, torch.tensor([[3.0, 4.0]]))(torch.zeros(1, 2)).loss
    assert loss.item() == (3.125 if name == 'ema' else 15.625)


@every_codebook
@pytest.mark.parametrize('beta', [0.0, 0.25, 2.0])
def test_each_term_moves_its_side_and_beta_scales_that_of_tokens(name, beta):
    codes = torch.randn(M, D)
    codes[2] = 100.0  # never selected
    book, x = make(name, codes, commitment=beta), torch.randn(20, D, requires_grad=True)
    quantized = book(x)
    quantized.loss.backward()
    # d/dx of beta * mean (x - v)^2
    slope = 2 * (x - quantized.codes).detach() / x.numel()
    torch.testing.assert_close(x.grad, beta * slope)
    if name in ('plain', 'cvq'):
        one_hot = torch.nn.functional.one_hot(quantized.indices, M).float()
        torch.testing.assert_close(book.embed.grad, one_hot.t() @ -slope)
        assert not book.embed.grad[2].any()


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


@every_codebook
def test_the_largest_cosine_wins_known_answer(name):
    # token (3, 4), codes (4, 0) and (0, 20): the first is nearer, 1 + 16 < 9 + 256, but the cosines
    # are 0.6 and 0.8. Of length one (0.6, 0.8) and (0, 1): mean square (0.36 + 0.04) / 2 = 0.2,
    # both terms 0.2 * 1.25 = 0.25, without the codebook term 0.2 * 0.25 = 0.05. At the token's
    # length 5 the code is (0, 5), and its error (9 + 1) / 2 = 5
    book = make(name, torch.tensor([[4.0, 0.0], [0.0, 20.0]]), use_cosine_sim=True)
    quantized = book(torch.tensor([[3.0, 4.0]]))
    assert quantized.indices.tolist() == [1]
    torch.testing.assert_close(quantized.codes, torch.tensor([[0.0, 5.0]]))
    torch.testing.assert_close(quantized.loss.item(), 0.05 if name == 'ema' else 0.25)
    torch.testing.assert_close(quantized.error.item(), 5.0)


@every_codebook
def test_the_length_of_a_token_decides_nothing_and_has_no_gradient(name):
    book = make(name, torch.randn(M, D), use_cosine_sim=True)
    x = torch.randn(20, D).requires_grad_()
    lengths = 10 ** torch.linspace(-2, 2, 20)[:, None]
    found, longer = book(x), book(lengths * x)
    assert torch.equal(found.indices, longer.indices)
    torch.testing.assert_close(found.loss, longer.loss)
    found.loss.backward()
    assert x.grad is not None and x.grad.abs().max() > 1e-3
    # rounding errors of 8 products of size 0.1
    torch.testing.assert_close((x.grad * x).sum(dim=1), torch.zeros(20), rtol=0, atol=1e-6)


def test_a_start_by_directions_finds_them():
    book = CODEBOOKS['ema'](M, D, use_cosine_sim=True)
    centres = torch.eye(D)[:M]  # around them tokens of very different length
    x = centres[torch.arange(120) % M] + 0.01 * torch.randn(120, D)
    x *= 10 ** torch.linspace(-1, 1, 120)[:, None]
    learn(book, x)
    distance, owner = torch.cdist(centres, book.codes()).min(dim=1)
    assert sorted(owner.tolist()) == list(range(M))
    assert distance.max() < 0.02  # as `test_kmeans_finds_separated_clusters`
    # the mean of a cluster is 8 * 0.01^2 / 2 = 4e-4 shorter
    torch.testing.assert_close(book.embed.norm(dim=1), torch.ones(M), rtol=0, atol=1e-5)
    # ten more updates keep them there: sums are of directions too
    for _ in range(10):
        learn(book, x)
    assert torch.cdist(centres, book.codes()).min(dim=1).values.max() < 0.02


@pytest.mark.parametrize('name', [n for n, c in CODEBOOKS.items() if issubclass(c, UsageCodebook)])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_averages_stay_float32_in_a_model_that_is_cast(name, dtype):
    plain, built = CODEBOOKS[name](M, D), CODEBOOKS[name](M, D, dtype=dtype)
    books = [plain, copy.deepcopy(plain).to(dtype), built]
    for _ in range(300):
        x = torch.randn(50, D) + 5
        indices = plain(x).indices
        for book in books:
            book.observe(x, indices)
            book.update()
    # the same sums of the same tokens: every bit. In bfloat16 1 % of the way is below half of the
    # last place, 2^-9 = 0.2 %, as soon as an average is within 20 % of its aim: it stays there
    for book in books[1:]:
        for key, value in plain.named_buffers():
            assert torch.equal(book.get_buffer(key), value), key


SHARE = 0.3


def test_rotation_known_answer():
    # (2, 0) onto (0, 3): a quarter turn [[0, -1], [1, 0]], stretched by 1.5. Transposed, it takes
    # the gradient (5, 7) to 1.5 (7, -5)
    x = torch.tensor([[2.0, 0.0]], requires_grad=True)
    out = rotate_to(x, torch.tensor([[0.0, 3.0]]))
    assert out.tolist() == [[0.0, 3.0]]
    out.backward(torch.tensor([[5.0, 7.0]]))
    torch.testing.assert_close(x.grad, torch.tensor([[10.5, -7.5]]))


def test_tokens_without_a_rotation():
    # without a length: straight through. Opposite to the code: the mirror I - 2 x^ x^^T, stretched
    x = torch.tensor([[0.0, 0, 0], [2, 0, 0]], requires_grad=True)
    codes = torch.tensor([[-1.0, 0, 0]] * 2)
    out = rotate_to(x, codes)
    assert torch.equal(out, codes)
    out.sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([[1.0, 1, 1], [-0.5, 0.5, 0.5]]))


@pytest.mark.parametrize(
    'expert_input, of_token, of_code',
    [('mix', 1 - SHARE, SHARE), ('ste', 0.0, 1.0), ('official', 1 - 2 * SHARE, SHARE)],
)
def test_every_reading_keeps_its_values_and_turns_the_code(expert_input, of_token, of_code):
    options = {'codebook': 'ema', 'expert_input': expert_input, 'code_share': SHARE}
    straight, turned = (
        Quantizer(D, VQMoEConfig(rotation_trick=rotation_trick, **options))
        for rotation_trick in (False, True)
    )
    x, code, gradient = torch.randn(5, D, requires_grad=True), torch.randn(5, D), torch.randn(5, D)
    out = turned.expert_input(x, code)
    torch.testing.assert_close(out, straight.expert_input(x, code))
    out.backward(gradient)
    other = x.detach().clone().requires_grad_()
    rotate_to(other, code).backward(gradient)
    torch.testing.assert_close(x.grad, of_token * gradient + of_code * other.grad)
