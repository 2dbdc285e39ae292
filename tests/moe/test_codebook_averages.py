"""How much the averages of a codebook trust its start: even usage, or what k-means counted."""

import pytest
import torch
from torch import Tensor

from vqmoe_vision.moe.codebook_learning import CODEBOOKS, GradientCodebook
from vqmoe_vision.moe.codebook_sample import code_shares
from vqmoe_vision.moe.methods.vqmoe import VQMoEConfig

from .codebooks import STARTED, M, learn, same, state
from .conftest import D

RARE, CODES = 2, 8  # of 100 tokens


def uneven(rare: Tensor) -> Tensor:
    """100 tokens at eight far points (D = 8): two at `rare`, fourteen at each of the others."""
    return torch.cat([rare.expand(RARE, D), 10 * torch.eye(D)[1:].repeat(14, 1)])


def owner(book: GradientCodebook, x: Tensor) -> int:
    """The code that takes a token."""
    return int(book(x[None]).indices)


@pytest.mark.parametrize(
    ('from_kmeans', 'covered'),
    # 0.99^100 = 0.366 is left of the start, which weighs 1 / 8 or 0.02; the rest has 0.02:
    # 0.634 * 0.02 / (0.366 * 0.125 + 0.634 * 0.02) = 0.217, and 0.634
    [(False, 0.217), (True, 0.634)],
)
def test_how_far_a_rare_code_follows_its_tokens_known_answer(from_kmeans, covered) -> None:
    book = CODEBOOKS['ema'](CODES, D, usage_from_kmeans=from_kmeans)
    before = 10 * torch.eye(D)[0]
    learn(book, uneven(before))
    code = owner(book, before)
    torch.testing.assert_close(book.codes()[code], before)
    after = before - torch.eye(D)[0]
    for _ in range(100):
        learn(book, uneven(after))
    way = (before - book.codes()[code])[0].item()
    assert way == pytest.approx(covered, abs=0.001)


@pytest.mark.parametrize('name', STARTED)
def test_usage_starts_as_k_means_counted(name: str) -> None:
    book = CODEBOOKS[name](CODES, D, usage_from_kmeans=True)
    rare = 10 * torch.eye(D)[0]
    learn(book, uneven(rare))
    expected = torch.full((CODES,), 0.14)
    expected[owner(book, rare)] = 0.02
    torch.testing.assert_close(book.usage, expected)
    if name == 'ema':
        torch.testing.assert_close(book.token_sums, book.usage[:, None] * book.codes())


@pytest.mark.parametrize('name', STARTED)
def test_a_code_that_replaces_a_dead_one_starts_at_even_usage_even_so(name: str) -> None:
    book = CODEBOOKS[name](CODES, D, usage_from_kmeans=True, dead_code_threshold=0.2)
    rare = 10 * torch.eye(D)[0]
    learn(book, uneven(rare))
    code = owner(book, rare)
    assert book.usage[code] * CODES == pytest.approx(0.16)  # dead, from the next update on
    learn(book, uneven(rare))
    assert book.usage[code] * CODES == pytest.approx(1)


def test_a_code_without_tokens_weighs_one_and_keeps_its_place() -> None:
    # six codes for three distinct tokens: three of them repeat a place, and no token takes those
    x = 10 * torch.eye(D)[:3]
    book = CODEBOOKS['ema'](M, D, usage_from_kmeans=True, dead_code_threshold=0.0)
    learn(book, x)
    torch.testing.assert_close(book.usage, torch.full((M,), 1 / 3))
    for _ in range(20):
        learn(book, x)
    # epsilon takes 1e-5 of a token from places: 1e-5 / (0.99^20 + 1e-5)
    torch.testing.assert_close(
        torch.cdist(book.codes(), x).min(dim=1).values, torch.zeros(M), rtol=0, atol=1e-3
    )


def test_shares_are_of_the_usable_tokens_of_the_sample() -> None:
    # codes 0 and 1 get three and one of four usable tokens; code 2 none, which counts as one
    sample = torch.tensor([[0.0], [0.1], [-0.1], [5.0], [5.0], [5.0]])
    usable = torch.tensor([True, True, True, True, False, False])
    shares = code_shares(sample, torch.tensor([[0.0], [5.0], [50.0]]), usable)
    assert shares.tolist() == [0.75, 0.25, 0.25]


@pytest.mark.parametrize('name', STARTED)
def test_a_state_that_has_started_keeps_its_counts(name: str) -> None:
    book, twin = (CODEBOOKS[name](CODES, D, usage_from_kmeans=True) for _ in range(2))
    learn(book, uneven(10 * torch.eye(D)[0]))
    # in place, as averages of weights: k-means is computed once more, and not taken over
    for ours, theirs in zip(twin.state_dict().values(), state(book).values(), strict=True):
        ours.copy_(theirs)
    x = torch.randn(50, D)
    learn(book, x)
    learn(twin, x)
    assert same(state(book), twin.state_dict())


@pytest.mark.parametrize(
    'options',
    [
        {'codebook': 'plain', 'usage_from_kmeans': True},
        {'codebook': 'cvq', 'usage_from_kmeans': True},
        {'codebook': 'gradient', 'dead_code_threshold': 0.0, 'usage_from_kmeans': True},
        {'codebook': 'gradient', 'dead_code_threshold': 0.0, 'ema_decay': 0.9},
        {'train_codebook': False, 'usage_from_kmeans': True},
        {'form': 'continuous', 'usage_from_kmeans': True},
    ],
    ids=str,
)
def test_options_of_averages_that_nothing_reads(options: dict[str, object]) -> None:
    *_, name = options
    with pytest.raises(ValueError, match=f'^{name}='):
        VQMoEConfig.from_options(**options)
