"""Codes that few tokens take: replaced when dead, moved by CVQ and SimVQ, and against collapse."""

import math

import pytest
import torch

from vqmoe_vision.moe.codebooks.ema import CODEBOOKS
from vqmoe_vision.moe.codebooks.usage import anchor_probabilities
from vqmoe_vision.moe.routing import expert_load, perplexity

from .codebooks import STARTED, M, learn, make
from .conftest import D

# --- dead codes


@pytest.mark.parametrize('name', STARTED)
def test_only_the_dead_code_is_replaced_by_a_token(name):
    book = make(name)
    x = torch.randn(60, D)
    indices = torch.arange(60) % M
    with torch.no_grad():
        book.usage[2] = 0.0
    indices[indices == 2] = 3
    book.observe(x, indices)
    assert book.update()
    assert (book.codes()[2] == x).all(dim=1).any()
    others = [0, 1, 3, 4, 5]
    assert not (book.codes()[others, None] == x[None]).all(dim=-1).any()
    # even usage again, else it would be dead at the next update
    torch.testing.assert_close(book.usage[2], torch.tensor(1 / M))
    torch.testing.assert_close(book.token_sums[2] * M, book.codes()[2])


@pytest.mark.parametrize('name', STARTED)
def test_codes_that_are_replaced_together_take_tokens_in_turn(name):
    book = make(name, torch.randn(64, D))
    dead = torch.arange(64) % 2 == 0
    for counts in [20, 40, 60]:  # of tokens, one not usable: 32 codes take 19, and 13 of them again
        with torch.no_grad():
            book.usage.masked_fill_(dead, 0)
        x = torch.randn(counts, D)
        x[3] = torch.nan
        book.observe(x, torch.arange(counts) % 32 * 2 + 1)
        book.update()
        revived, times = book.codes()[dead].unique(dim=0, return_counts=True)
        assert (revived[:, None] == x).all(dim=-1).any(dim=1).all()
        assert len(revived) == min(32, counts - 1) and times.max() <= 2


@pytest.mark.parametrize('name', STARTED)
def test_an_unused_code_is_replaced_after_459_updates(name):
    # usage 0.99^n of even: 0.99^458 = 0.01002, 0.99^459 = 0.00992 < 1 %
    book = make(name)
    x = torch.randn(10, D)
    indices = torch.arange(10) % (M - 1)
    unused = book.codes()[M - 1].clone()
    for _ in range(458):
        learn(book, x, indices)
    # EMA divides by its smoothed usage, 0.01 / M + 1e-5, and drifts by the smoothing
    torch.testing.assert_close(book.codes()[M - 1], unused, rtol=0.01, atol=0.01)
    learn(book, x, indices)
    assert (book.codes()[M - 1] == x).all(dim=1).any()


# --- CVQ


def moved_share(book, usage_counts):
    """Share of the way to the anchor that each code goes in an update with these counts."""
    indices = torch.repeat_interleave(torch.arange(M), torch.tensor(usage_counts))
    anchor = torch.full((1, D), 50.0)
    before = book.codes().clone()
    book.observe(anchor.expand(len(indices), D), indices)
    book.update()
    return ((book.codes() - before) / (anchor - before)).mean(dim=1)


def test_cvq_rate_known_answers():
    # never used: exp(-0.001) = 0.99900; first step at even usage, N = 0.01 / M:
    # exp(-0.01 / M * M * 10 / 0.01 - 0.001) = exp(-10.001) = 4.54e-5
    share = moved_share(make('cvq'), [0, 10, 10, 10, 10, 20])
    assert share[0].item() == pytest.approx(math.exp(-0.001), abs=1e-5)
    assert share[1:5].tolist() == pytest.approx([math.exp(-10.001)] * 4, abs=2e-6)
    # twice even usage: exp(-20.001) = 2e-9
    assert share[5].item() == pytest.approx(0, abs=1e-7)


def test_cvq_draws_anchors_by_the_squared_distance():
    # distances 1 and 3 from the code: exp(-1) / (exp(-1) + exp(-9)) = 0.99966; not squared, 0.88
    sample = torch.tensor([[1.0, 0.0], [0.0, 3.0], [0.0, 0.0]])
    found = anchor_probabilities(torch.zeros(1, 2), sample, torch.tensor([True, True, False]))
    torch.testing.assert_close(found, torch.tensor([[0.99966465, 0.00033535, 0.0]]))


# --- SimVQ


# --- collapse


def final_perplexity(name, mean, num_codes=8):
    """Perplexity of code usage after training on clusters around a mean that all tokens share."""
    book = CODEBOOKS[name](num_codes, D)
    centres = torch.randn(num_codes, D) + mean
    parameters = list(book.parameters())
    optimizer = torch.optim.Adam(parameters, lr=0.01) if parameters else None

    def draw():
        return centres[torch.randint(num_codes, (512,))] + 0.1 * torch.randn(512, D)

    for _ in range(100):
        loss = learn(book, draw()).loss
        if optimizer is not None:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return perplexity(expert_load(book(draw()).indices, num_codes))


# far from the tokens CVQ's codes have one nearest token in common: at a mean of 20 they share it
@pytest.mark.parametrize(
    ('name', 'mean'),
    [('ema', 5.0), ('ema', 20.0), ('cvq', 5.0)],
)
def test_codebooks_with_a_data_dependent_start_do_not_collapse(name, mean):
    assert final_perplexity(name, mean=mean) > 4
