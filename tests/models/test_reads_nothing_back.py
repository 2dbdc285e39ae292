"""A training step waits for nothing on its device: on the meta device there is nothing to read.

A tensor there has a shape and no numbers, so that whatever reads one back raises. What meta would
hide is refused by name: operators of our own, inside which nobody looks, and numbers of the host
that an operator copies to the device, which on CUDA waits for everything before.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vqmoe_vision import collect_losses
from vqmoe_vision.moe import MoeLayer, RoutedMlp, moe_layers, use_kernel
from vqmoe_vision.moe.codebook_learning import CODEBOOKS, GradientCodebook

from .conftest import make

SMALL = {'embed_dim': 16, 'depth': 2, 'num_experts': 4}
every_codebook = pytest.mark.parametrize('codebook', CODEBOOKS)
WAITS = {torch.ops.aten.where.self}  # pointwise, but it copies a number, where others pass it on


class Watch(TorchDispatchMode):
    """Refuses what would wait on a device without raising on meta."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        assert func.namespace != 'vqmoe_vision', f'{func} may read back inside'
        answer = func(*args, **kwargs)
        leaves = tree_leaves((args, kwargs, answer))
        devices = {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)}
        passed_on = torch.Tag.pointwise in func.tags and func not in WAITS
        assert passed_on or len(devices) < 2, f'{func} copies from the host'
        return answer


def on_meta(model: nn.Module) -> nn.Module:
    return model.to('meta', torch.bfloat16).train()


def train(model: nn.Module, steps: int = 3) -> None:
    """Whole steps, of which the first starts codebooks and the second freezes what is due."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images = torch.empty(4, 3, 32, 32, device='meta', dtype=torch.bfloat16)
    targets = torch.empty(4, device='meta', dtype=torch.int64)
    with use_kernel('grouped_mm'):
        for _ in range(steps):
            optimizer.zero_grad()
            with Watch(), collect_losses(model) as collected:
                loss = F.cross_entropy(model(images).float(), targets) + collected.total()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
            assert all(value.is_meta for value in collected.stats.values())


def test_a_training_step_reads_nothing_back(tiny_variant: Callable[..., nn.Module]) -> None:
    model = on_meta(tiny_variant(**SMALL))
    train(model)
    assert all(p.grad is not None for p in model.parameters())


@every_codebook
@pytest.mark.parametrize('cosine', [False, True])
def test_no_codebook_reads_back(codebook: str, cosine: bool) -> None:
    train(on_meta(make('vqmoe', codebook=codebook, use_cosine_sim=cosine, **SMALL)))
