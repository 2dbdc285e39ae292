"""How codes start: k-means, at the first update, and once, whatever a state went through."""

import copy
import pickle

import pytest
import torch

from vqmoe_vision.moe.codebooks.ema import CODEBOOKS
from vqmoe_vision.moe.codebooks.usage import kmeans

from .codebooks import STARTED, M, clusters, learn, same, state
from .conftest import D


@pytest.mark.parametrize('mean', [0.0, 20.0])
def test_kmeans_finds_separated_clusters(mean):
    x, centres = clusters(120, mean=mean)
    distance, owner = torch.cdist(centres, kmeans(x, M)).min(dim=1)
    assert sorted(owner.tolist()) == list(range(M))
    # a mean of 20 tokens is 0.01 / sqrt(20) from its centre in each of 8 coordinates
    assert distance.max() < 0.02


@pytest.mark.parametrize('name', STARTED)
def test_a_start_happens_once(name):
    book = CODEBOOKS[name](M, D)
    x = clusters(120)[0]
    learn(book, x)
    before = book.codes().clone()
    learn(book, x + 100)
    # all tokens take one EMA code: 0.01 / (0.99 / 6 + 0.01) = 6 % of a way of 100, where a second
    # start would have moved every code by about 100
    assert (book.codes() - before).abs().max() < 10


def copied_in_place(book, twin):
    """Past everything, as averages of weights do."""
    for ours, theirs in zip(twin.state_dict().values(), state(book).values(), strict=True):
        ours.copy_(theirs)
    return twin


def loaded(book, twin, **options):
    twin.load_state_dict(state(book), **options)
    return twin


WAYS = {
    'loaded': loaded,
    'assigned': lambda book, twin: loaded(book, twin, assign=True),
    'in place': copied_in_place,
    'from meta': lambda book, twin: loaded(book, twin.to('meta').to_empty(device='cpu')),
    'assigned from meta': lambda book, twin: loaded(book, twin.to('meta'), assign=True),
    'copied': lambda book, _: copy.deepcopy(book),
    'pickled': lambda book, _: pickle.loads(pickle.dumps(book)),
}


@pytest.mark.parametrize('name', STARTED)
@pytest.mark.parametrize('way', WAYS)
def test_a_state_that_has_started_does_not_start_again(name, way):
    book = CODEBOOKS[name](M, D)
    learn(book, torch.randn(50, D))
    twin = WAYS[way](book, CODEBOOKS[name](M, D))
    x = torch.randn(50, D)
    learn(book, x)
    learn(twin, x)
    assert same(state(book), twin.state_dict())


@pytest.mark.parametrize('name', STARTED)
@pytest.mark.parametrize('way', ['loaded', 'initialised'])
def test_a_state_that_has_not_started_starts(name, way):
    book = CODEBOOKS[name](M, D)
    fresh = state(book)
    learn(book, torch.randn(50, D))
    book.init_weights() if way == 'initialised' else book.load_state_dict(fresh)
    x, centres = clusters(120, mean=10.0)
    learn(book, x)
    assert torch.cdist(centres, book.codes()).min(dim=1).values.max() < 0.02
