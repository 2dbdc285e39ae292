"""Options of codebooks: directions, averages that start fast, dead codes; and another library."""

import copy

import pytest
import torch
from torch import Tensor

from vqmoe_vision.moe.codebooks.ema import CODEBOOKS, UsageCodebook

from .codebooks import M, every_codebook, learn, make
from .conftest import D

AVERAGED = [name for name, cls in CODEBOOKS.items() if issubclass(cls, UsageCodebook)]


# --- directions


@every_codebook
def test_the_largest_cosine_wins_known_answer(name: str) -> None:
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
def test_the_length_of_a_token_decides_nothing_and_has_no_gradient(name: str) -> None:
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


def directions(num_tokens: int) -> tuple[Tensor, Tensor]:
    """Tokens of very different length around M directions, and these."""
    centres = torch.eye(D)[:M]
    lengths = 10 ** torch.linspace(-1, 1, num_tokens)[:, None]
    tokens = centres[torch.arange(num_tokens) % M] + 0.01 * torch.randn(num_tokens, D)
    return lengths * tokens, centres


def test_a_start_by_directions_finds_them() -> None:
    book = CODEBOOKS['ema'](M, D, use_cosine_sim=True)
    x, centres = directions(120)
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


# --- averages


@pytest.mark.parametrize('name', AVERAGED)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_averages_stay_float32_in_a_model_that_is_cast(name: str, dtype: torch.dtype) -> None:
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


# --- dead codes


# --- another library


# --- options of a method
