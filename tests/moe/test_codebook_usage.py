"""Of which tokens a codebook learns: of none that is not finite, and of a sample of all places."""

import copy

import pytest
import torch

from vqmoe_vision.moe.codebooks.ema import CODEBOOKS
from vqmoe_vision.moe.codebooks.usage import SAMPLE_SIZE, code_usage
from vqmoe_vision.moe.routing import expert_load, perplexity

from .codebooks import STARTED, ZERO, M, clusters, learn, make, same, state
from .conftest import D

# --- tokens that are not finite


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
    # and the codes are as many as ever
    assert perplexity(expert_load(book(x).indices, M)) > 2


@pytest.mark.parametrize('name', CODEBOOKS)
def test_updates_without_any_token_change_nothing(name):
    book = CODEBOOKS[name](M, D)
    before = state(book)
    for _ in range(2):
        learn(book, torch.empty(0, D))
    assert same(before, book.state_dict())
    if name in STARTED:
        x, centres = clusters(120, mean=10.0)
        learn(book, x)
        assert torch.cdist(centres, book.codes()).min(dim=1).values.max() < 0.02


# --- the sample


def test_the_sample_covers_all_positions_of_a_grid_of_patches():
    # 64 images of 16 x 16 patches: a stride of 16 would take the left column only
    positions = torch.arange(256).repeat(64)
    x = positions[:, None].float().expand(-1, 2) + 1
    sample = code_usage(x, positions % M, M, ZERO, 0).tokens[:, 0] - 1
    assert len(sample) == SAMPLE_SIZE
    # 1024 draws of 256 positions: 4 each on average; none with probability e^-4, so about 5 of 256
    assert len(sample.unique()) > 240
    columns = torch.bincount(sample.long() % 16, minlength=16)
    # 64 +- 8 each, four standard deviations
    assert columns.min() > 32 and columns.max() < 96
