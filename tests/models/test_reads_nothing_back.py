"""A training step waits for nothing on its device: on the meta device there is nothing to read."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqmoe_vision import collect_losses
from vqmoe_vision.moe import use_kernel

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
