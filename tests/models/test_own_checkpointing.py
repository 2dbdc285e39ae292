"""Blocks under torch's `checkpoint`, called by a user and not by `set_grad_checkpointing`."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vqmoe_vision import collect_losses
from vqmoe_vision.moe import METHODS


class Checkpointed(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False)


def gradients_of(model: nn.Module, batches: list[Tensor]) -> list[Tensor | None]:
    """After all forward passes and then one backward."""
    torch.manual_seed(3)
    with collect_losses(model, update_state=False) as collected:
        loss = sum(model(images).square().mean() for images in batches) + collected.total()
        loss.backward()
    return [p.grad for p in model.parameters() if p.requires_grad]


def in_blocks(model: nn.Module) -> nn.Module:
    model.blocks = nn.Sequential(*map(Checkpointed, model.blocks))
    return model


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('passes', [1, 2])
@pytest.mark.parametrize('checkpointed', [in_blocks, Checkpointed])
def test_gradients_are_the_same_or_refused(
    make_tiny: Callable, method: str, passes: int, checkpointed: Callable
) -> None:
    batches = [torch.randn(4, 3, 32, 32) for _ in range(passes)]
    plain = make_tiny(method, depth=2).train()
    own = checkpointed(copy.deepcopy(plain))
    if passes == 2 and METHODS[method].read_patches is not None:
        with pytest.raises(RuntimeError, match=r'use model\.set_grad_checkpointing\(\)'):
            gradients_of(own, batches)
    else:
        expected = gradients_of(plain, batches)
        torch.testing.assert_close(gradients_of(own, batches), expected, rtol=1e-6, atol=1e-7)
