"""A training step waits for nothing on its device: on the meta device there is nothing to read."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqmoe_vision import collect_losses
from vqmoe_vision.moe import use_kernel
from vqmoe_vision.moe.codebooks import CODEBOOKS
from vqmoe_vision.moe.codebooks.ema import EmaCodebook
from vqmoe_vision.moe.codebooks.usage import _numbers

from ..watch import RAISED, READS, Watch
from .conftest import make

SMALL = {'embed_dim': 16, 'depth': 1, 'moe_layers': [0], 'num_experts': 4}


def train(model: nn.Module) -> None:
    """Two steps: codebooks start in the first, and a stage of one step is over in the second."""
    model.to('meta', torch.bfloat16).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images = torch.empty(4, 3, 32, 32, device='meta', dtype=torch.bfloat16)
    targets = torch.empty(4, device='meta', dtype=torch.int64)
    with use_kernel('grouped_mm'):
        for _ in range(2):
            optimizer.zero_grad()
            with Watch(), collect_losses(model) as collected:
                loss = F.cross_entropy(model(images).float(), targets) + collected.total()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
            assert all(value.is_meta for value in collected.stats.values())


def test_a_training_step_reads_nothing_back(tiny_variant: Callable[..., nn.Module]) -> None:
    model = tiny_variant(**SMALL)
    train(model)
    assert any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize('cosine', [False, True])
@pytest.mark.parametrize('name', CODEBOOKS)
def test_no_codebook_reads_back(name: str, cosine: bool) -> None:
    book = CODEBOOKS[name](4, 8, use_cosine_sim=cosine, device='meta')
    x = torch.empty(20, 8, device='meta')
    with Watch():
        for _ in range(2):
            for _ in range(2):  # passes of an update
                book.observe(x, book(x).indices)
            book.update()


def test_random_numbers_read_nothing_back() -> None:
    rows, updates = torch.empty(2, 9, dtype=torch.int64, device='meta').unbind()
    with Watch():
        assert _numbers(rows, [updates[0]], [7, 0]).is_meta


# --- the test sees what it is for


@pytest.mark.parametrize(
    ('name', 'read'),
    [*(('router', read) for read in READS), ('quantizer.codebook', 'item'), ('experts', 'item')],
)
def test_a_single_read_is_seen(name: str, read: str) -> None:
    def hook(_module: nn.Module, args: tuple[Tensor, ...], _answer: object) -> None:
        READS[read](args[0].detach())

    model = make('vqmoe', **SMALL)
    model.blocks[0].mlp.get_submodule(name).register_forward_hook(hook)
    with pytest.raises(RAISED):
        train(model)


def test_a_read_in_an_update_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def average(codebook: EmaCodebook, _average: Tensor, value: Tensor, _: Tensor) -> None:
        codebook.usage.fill_(value.max().item())

    monkeypatch.setattr(EmaCodebook, '_average', average)
    with pytest.raises(RAISED):
        train(make('vqmoe', **SMALL))
