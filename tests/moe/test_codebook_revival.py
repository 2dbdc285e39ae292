"""Codes that few tokens take: replaced when dead, moved by CVQ and SimVQ, and against collapse."""

import copy
import math
import pickle

import pytest
import torch

from vqmoe_vision.moe.codebooks.ema import CODEBOOKS, EmaCodebook
from vqmoe_vision.moe.codebooks.usage import SAMPLE_SIZE, code_usage, kmeans
from vqmoe_vision.moe.routing import expert_load, perplexity

from .codebooks import STREAM, M, clusters, learn, make, same, state
from .conftest import D


def test_only_the_dead_code_is_replaced_by_a_token():
    book, x, indices = make('ema'), torch.randn(60, D), torch.arange(60) % M
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


def test_codes_that_are_replaced_together_take_tokens_in_turn():
    book = make('ema', torch.randn(64, D))
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


def test_an_unused_code_is_replaced_after_459_updates():
    # usage 0.99^n of even: 0.99^458 = 0.01002, 0.99^459 = 0.00992 < 1 %
    book = make('ema')
    x = torch.randn(10, D)
    indices = torch.arange(10) % (M - 1)
    unused = book.codes()[M - 1].clone()
    for _ in range(458):
        learn(book, x, indices)
    # EMA divides by its smoothed usage, 0.01 / M + 1e-5, and drifts by the smoothing
    torch.testing.assert_close(book.codes()[M - 1], unused, rtol=0.01, atol=0.01)
    learn(book, x, indices)
    assert (book.codes()[M - 1] == x).all(dim=1).any()


def test_cvq_rate_known_answers():
    # never used: exp(-0.001) = 0.99900; first step at even usage, N = 0.01 / M:
    # exp(-0.01 / M * M * 10 / 0.01 - 0.001) = exp(-10.001) = 4.54e-5
    book, anchor = make('cvq'), torch.full((1, D), 50.0)
    before = book.codes().clone()
    indices = torch.arange(M).repeat_interleave(torch.tensor([0, 10, 10, 10, 10, 20]))
    book.observe(anchor.expand(len(indices), D), indices)
    book.update()
    share = ((book.codes() - before) / (anchor - before)).mean(dim=1)
    assert share[0].item() == pytest.approx(math.exp(-0.001), abs=1e-5)
    assert share[1:5].tolist() == pytest.approx([math.exp(-10.001)] * 4, abs=2e-6)
    # twice even usage: exp(-20.001) = 2e-9
    assert share[5].item() == pytest.approx(0, abs=1e-7)


# far from the tokens CVQ's codes have one nearest token in common: at a mean of 20 they share it
@pytest.mark.parametrize('name, mean', [('ema', 5.0), ('ema', 20.0), ('cvq', 5.0)])
def test_codebooks_with_a_data_dependent_start_do_not_collapse(name, mean):
    """Trained on clusters around a mean that all tokens share."""
    book, centres = CODEBOOKS[name](8, D), torch.randn(8, D) + mean
    # EMA's codes have no gradient
    optimizer = torch.optim.Adam([*book.parameters(), torch.nn.Parameter(torch.ones(1))], lr=0.01)
    for _ in range(101):
        quantized = learn(book, centres[torch.randint(8, (512,))] + 0.1 * torch.randn(512, D))
        if quantized.loss.requires_grad:
            optimizer.zero_grad()
            quantized.loss.backward()
            optimizer.step()
    assert perplexity(expert_load(quantized.indices, 8)) > 4


@pytest.mark.parametrize('mean', [0.0, 20.0])
def test_kmeans_finds_separated_clusters(mean):
    x, centres = clusters(120, mean=mean)
    distance, owner = torch.cdist(centres, kmeans(x, M)).min(dim=1)
    assert sorted(owner.tolist()) == list(range(M))
    # a mean of 20 tokens is 0.01 / sqrt(20) from its centre in each of 8 coordinates
    assert distance.max() < 0.02


@pytest.mark.parametrize('way', ['loaded', 'assigned from meta', 'in place', 'pickled'])
def test_a_state_that_has_started_does_not_start_again(way):
    book, twin = EmaCodebook(M, D), EmaCodebook(M, D)
    learn(book, torch.randn(50, D))
    if way == 'pickled':
        twin = pickle.loads(pickle.dumps(book))
    elif way == 'in place':
        for ours, theirs in zip(twin.state_dict().values(), state(book).values(), strict=True):
            ours.copy_(theirs)
    else:
        assign = way != 'loaded'
        (twin.to('meta') if assign else twin).load_state_dict(state(book), assign=assign)
    x, before = torch.randn(50, D) + 100, book.codes().clone()
    learn(book, x)
    learn(twin, x)
    assert same(state(book), twin.state_dict())
    # all tokens take one EMA code: 0.01 / (0.99 / 6 + 0.01) = 6 % of a way of 100, where a second
    # start would have moved every code by about 100
    assert (book.codes() - before).abs().max() < 10


@pytest.mark.parametrize('way', ['loaded', 'initialised'])
def test_a_state_that_has_not_started_starts(way):
    book = EmaCodebook(M, D)
    fresh = state(book)
    learn(book, torch.randn(50, D))
    book.init_weights() if way == 'initialised' else book.load_state_dict(fresh)
    x, centres = clusters(120, mean=10.0)
    learn(book, x)
    assert torch.cdist(centres, book.codes()).min(dim=1).values.max() < 0.02


@pytest.mark.parametrize('name', ['ema', 'cvq'])
@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf'), 3e38])
@pytest.mark.parametrize('started', [True, False], ids=['started', 'before the start'])
def test_a_token_that_is_not_finite_spoils_nothing(name, bad, started):
    torch.manual_seed(1)
    book = make(name) if started else CODEBOOKS[name](M, D)
    clean = copy.deepcopy(book)
    x = torch.randn(60, D)
    spoilt = torch.cat([x, torch.full((1, D), bad), torch.randn(1, D)])
    spoilt[-1, 3] = bad
    left_out = book.observe(spoilt, book(spoilt).indices)
    book.update()
    assert left_out == 2
    assert all(value.isfinite().all() for value in book.state_dict().values())
    # 60 clean tokens and no other: the counts and sums are those of a pass without the bad ones
    clean.observe(x, clean(x).indices)
    clean.update()
    torch.testing.assert_close(book.usage, clean.usage)
    if name == 'ema' and started:
        torch.testing.assert_close(book.codes(), clean.codes())
    assert perplexity(expert_load(book(x).indices, M)) > 2


@pytest.mark.parametrize('name', CODEBOOKS)
def test_updates_without_any_token_change_nothing(name):
    book = CODEBOOKS[name](M, D)
    before = state(book)
    for _ in range(2):
        learn(book, torch.empty(0, D))
    assert same(before, book.state_dict())
    if name == 'ema':
        x, centres = clusters(120, mean=10.0)
        learn(book, x)
        assert torch.cdist(centres, book.codes()).min(dim=1).values.max() < 0.02


def test_the_sample_covers_all_positions_of_a_grid_of_patches():
    # 64 images of 16 x 16 patches: a stride of 16 would take the left column only
    positions = torch.arange(256).repeat(64)
    x = positions[:, None].float().expand(-1, 2) + 1
    sample = code_usage(x, positions % M, M, STREAM).tokens[:, 0] - 1
    assert len(sample) == SAMPLE_SIZE
    # 1024 draws of 256 positions: 4 each on average; none with probability e^-4, so about 5 of 256
    assert len(sample.unique()) > 240
    columns = torch.bincount(sample.long() % 16, minlength=16)
    # 64 +- 8 each, four standard deviations
    assert columns.min() > 32 and columns.max() < 96
