"""A training step waits for nothing on its device: on the meta device there is nothing to read.

A tensor there has a shape and no numbers, so that whatever reads one back raises. What meta would
hide is refused by name: operators that are not torch's, inside which nobody looks, and numbers of
the host that an operator copies to the device, which on CUDA waits for all that was started before.
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
from vqmoe_vision.moe import use_kernel
from vqmoe_vision.moe.codebook_learning import CODEBOOKS, GradientCodebook
from vqmoe_vision.moe.counted_random import _numbers

from .conftest import make

SMALL = {'embed_dim': 16, 'depth': 1, 'moe_layers': [0], 'num_experts': 4}
NAMESPACES = ('aten', 'profiler')  # an optimizer marks its step for a profiler
# pointwise operators pass a number of the host on to the device, but this one copies it
COPIES = {torch.ops.aten.where.self}
# an operator of ours, into which a test of its own looks
LOOKED_INTO = torch.ops.vqmoe_vision.random_integers.default
RAISED = (AssertionError, NotImplementedError, RuntimeError)


class Watch(TorchDispatchMode):
    """Refuses what would wait on a device without raising on meta."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert func.namespace in NAMESPACES or func is LOOKED_INTO, f'{func} may read back inside'
        answer = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, answer))
        devices = {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)}
        passes_on = torch.Tag.pointwise in func.tags and func not in COPIES
        assert passes_on or len(devices) < 2, f'{func} copies from the host'
        return answer


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
    options = {'ema_decay_warmup': True} if issubclass(CODEBOOKS[name], GradientCodebook) else {}
    book = CODEBOOKS[name](4, 8, use_cosine_sim=cosine, device='meta', **options)
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


@torch.library.custom_op('test_reads_nothing_back::opaque', mutates_args=())
def opaque(x: Tensor) -> Tensor:
    return x * float(x.sum())


@opaque.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


READS: dict[str, Callable[[Tensor], Any]] = {
    'item': lambda x: x.sum().item(),
    'bool': lambda x: bool(x.any()),
    'int': lambda x: int(x.argmax()),
    'cpu': lambda x: x.cpu(),
    'mask': lambda x: x[x > 0],
    'nonzero': lambda x: x.nonzero(),
    'unique': lambda x: x.unique(),
    'split': lambda x: x.split(x.long().flatten().tolist()),
    'opaque': lambda x: opaque(x),
    'number': lambda x: torch.where(x > 0, x, torch.tensor(0.0)),
    'copy': lambda x: torch.tensor([1.0]).to(x.device),
    'generator': lambda x: torch.rand(3, generator=torch.Generator()).to(x.device),
}


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
    def average(codebook: GradientCodebook, _average: Tensor, value: Tensor, _: Tensor) -> None:
        codebook.usage.fill_(value.max().item())

    monkeypatch.setattr(GradientCodebook, '_average', average)
    with pytest.raises(RAISED):
        train(make('vqmoe', **SMALL))
