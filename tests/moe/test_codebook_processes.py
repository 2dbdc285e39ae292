"""Two processes learn one codebook from the tokens of both."""

from types import SimpleNamespace

import torch
import torch.distributed as dist

from vqmoe_vision.moe.codebooks.ema import CODEBOOKS
from vqmoe_vision.moe.codebooks.usage import code_usage
from vqmoe_vision.moe.distributed import place_experts
from vqmoe_vision.moe.experts import Experts

from .. import refused
from ..forked import spawn
from ..groups import begin
from .codebooks import BY_DISTANCE, STREAM, M, same, state
from .conftest import D, OneLayer

WORLD = 2
VARIANTS = {
    **{name: (name, {}) for name in CODEBOOKS},
    **{f'{name}, cosine': (name, {'use_cosine_sim': True}) for name in BY_DISTANCE},
    # the first batch of one rank is empty, and of the other one is usable or not
    **{f'empty, {name}': (name, {}) for name in ('ema', 'cvq')},
    **{f'spoilt, {name}': (name, {}) for name in ('ema', 'cvq')},
}


def batches():
    """The joint batches of both processes; the tokens of the last ten are shifted."""
    generator = torch.Generator().manual_seed(0)
    for step in range(20):
        x = torch.randn(300, D, generator=generator)
        yield x + (0 if step < 10 else 3)


def trained(rank):
    """Codebooks after the steps; rank r takes tokens r, r + 2, ..., the last batch unevenly."""
    states = {}
    for label, (name, options) in VARIANTS.items():
        torch.manual_seed(1)
        book = CODEBOOKS[name](M, D, **options)
        for step, x in enumerate(batches()):
            if step == 5 and hasattr(book, 'usage'):
                book.usage[1] = 0.0  # dead on every rank
            part = x[rank::WORLD] if step < 19 else x.split([250, 50])[rank]
            if label.startswith('spoilt') and step == 0:
                part = part[:0] if rank == 0 else part.fill_(torch.nan)
            if label.startswith('empty') and step == 0:
                part = part[: 150 * rank]
            book.observe(part, book(part).indices)
            book.update()
        states[label] = state(book)
    return states


TOKENS = 17


def images_of_all():
    """More tokens than a sample has, of a number of images that two ranks cannot share evenly."""
    images = torch.randn(401, TOKENS, D, generator=torch.Generator().manual_seed(0))
    images[7, 3] = torch.nan
    return images, (images[..., 0] > 0).long()


def run_rank(rank, folder):
    begin(rank, WORLD, folder)
    images, codes = images_of_all()
    part, indices = images[rank::WORLD].flatten(0, 1), codes[rank::WORLD].flatten()
    usage = code_usage(part, indices, M, STREAM, tokens_per_sample=TOKENS).over_ranks()
    torch.save((trained(rank), vars(usage)), f'{folder}/{rank}.pt')
    dist.destroy_process_group()


def test_two_processes_learn_one_codebook_from_the_tokens_of_both(tmp_path):
    spawn(run_rank, args=(str(tmp_path),), nprocs=WORLD)
    ranks = [torch.load(tmp_path / f'{rank}.pt') for rank in range(WORLD)]
    for label in VARIANTS:
        assert same(ranks[0][0][label], ranks[1][0][label]), label
    images, codes = images_of_all()
    single = code_usage(images.flatten(0, 1), codes.flatten(), M, STREAM)
    for _, joint in ranks:
        assert torch.equal(joint['counts'], single.counts)
        # up to 3000, of as many float32 numbers in another order: a few units of the last place
        torch.testing.assert_close(joint['token_sums'], single.token_sums, rtol=2e-6, atol=1e-3)
        assert torch.equal(joint['draws'], single.draws)
        assert torch.equal(joint['tokens'], single.tokens)


def test_refuses_processes_that_do_not_divide_the_experts():
    layer = OneLayer('smoe')
    three = SimpleNamespace(size=lambda: 3)
    refused(r'^experts of layer.experts=4', place_experts, layer, three)
    assert all(m.exchange is None for m in layer.modules() if isinstance(m, Experts))
