"""Two processes that share every batch against one process with the whole batch.

Rank r of S has the samples r, r + S, ... of the batch, as samplers deal them. All is as in one
process but for the order of float32 sums, and for router noise, which is drawn by rank.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import vqmoe_vision
from vqmoe_vision.moe import METHODS, losses, start_training
from vqmoe_vision.moe.losses import Loss, averaged_over_ranks

from ..forked import spawn
from ..groups import begin

WORLD = 2


# larger losses, where there are any, and no noise
OPTIONS = {'router_noise': 0.0, 'load_weight': 0.0, 'importance_weight': 0.5, 'balance_weight': 0.5}
OPTIONS |= {'router_drop': 0.0}
# Method and options: each method as it is by default, and with codes that learn from usage.
TRAINED: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in METHODS}
TRAINED['vqmoe-ema'] = 'vqmoe', {'preset': 'ema'}


def quiet(method: str, **options: Any) -> dict[str, Any]:
    """Options of a variant in which ranks train as one process."""
    options.pop('global_balance', None)
    config = METHODS[method].config
    chosen = config.from_options(**options)
    options |= {name: value for name, value in OPTIONS.items() if getattr(chosen, name, 0)}
    idle = config.of_preset(**options).unused()
    return {name: value for name, value in options.items() if name not in idle}


class TrainStep(nn.Module):
    """Model and losses in one module, which is what DistributedDataParallel has to wrap."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        with vqmoe_vision.collect_losses(self.model, update_state=False) as collected:
            collected.add({'task': F.cross_entropy(self.model(images), targets)}, len(images))
            total = collected.total()
        self.losses = collected.losses
        return total


def make(method: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    size = {'img_size': 16, 'patch_size': 8, 'embed_dim': 16, 'depth': 2, 'num_heads': 2}
    return timm.create_model(f'vit_tiny_{method}', **size, num_classes=10, **options).train()


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    """Of three steps of two batches each; the last one is smaller."""
    generator = torch.Generator().manual_seed(1)
    for size in (8, 8, 8, 8, 8, 7):
        yield torch.randn(size, 3, 16, 16, generator=generator), torch.arange(size)


def three_steps(model: nn.Module, mode: str) -> list[dict[str, Tensor]]:
    """Losses and gradients of each step, and what was learned; a rank takes its own samples."""
    start_training(model, 20)  # StableMoE freezes its router after two
    shared = dist.is_initialized()
    rank, size = (dist.get_rank(), dist.get_world_size()) if shared else (0, 1)
    step: Any = TrainStep(model)
    if shared:  # buffers of the first rank would hide what goes another way on the others
        step = DistributedDataParallel(step, broadcast_buffers=False)
    optimizer = torch.optim.SGD(step.parameters(), lr=0.1, momentum=0.9)
    found: list[dict[str, Tensor]] = []
    accumulates = mode == 'accumulated and checkpointed'
    model.set_grad_checkpointing(accumulates)
    for number, (images, targets) in enumerate(batches()):
        first = number % 2 == 0
        if first and not accumulates:
            continue
        with step.no_sync() if first and shared else nullcontext():
            step(images[rank::size], targets[rank::size]).backward()
        found.append(getattr(step, 'module', step).losses)
        if first:
            continue
        # a copy: the next step begins with another gradient in the same place
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
        optimizer.step()
        optimizer.zero_grad()
        vqmoe_vision.update_state(step)
    found.append(model.state_dict())
    return found


MODES = ('plain', 'accumulated and checkpointed')


def losses_of_tokens(rank: int = 0, size: int = 1) -> dict[str, Tensor]:
    """Every function of `moe.losses`, and gradients, of seven tokens that ranks take turns with."""
    generator = torch.Generator().manual_seed(3)
    logits, noise = torch.randn(2, 7, 4, generator=generator)
    joint = logits.requires_grad_()
    own, noisy = joint[rank::size], (joint + 0.3 * noise)[rank::size]
    probs, gates = own.softmax(dim=-1), own.sigmoid()[:, :2]
    indices = own.topk(2).indices
    terms: dict[str, Loss] = {
        'balance': 2.0 * losses.load_balance(probs, indices),
        'importance': losses.importance(probs),
        'load': losses.load(own, noisy, noise_std=0.3, top_k=2),
        'overload': losses.overload(gates, indices, 4),
        'z': losses.router_z(own),
        'own balance': losses.load_balance(probs, indices).value(),
    }
    values = averaged_over_ranks([(loss, len(own)) for loss in terms.values()])
    found = dict(zip(terms, values, strict=True))
    for name, value in list(found.items()):
        (found[f'{name}, gradient'],) = torch.autograd.grad(value, logits, retain_graph=True)
    return {name: value.detach() for name, value in found.items()}


def worker(rank: int, folder: Path) -> None:
    begin(rank, WORLD, folder)
    found: dict[str, Any] = {'losses': losses_of_tokens(rank, WORLD)}
    for name, (method, options) in TRAINED.items():
        calm = quiet(method, **options)
        found[name] = {mode: three_steps(make(method, **calm), mode) for mode in MODES}
        model = make(method, **options)
        torch.manual_seed(rank)  # other noise on each
        found[name]['state'] = three_steps(model, 'plain')[-1]
    torch.save(found, folder / f'rank{rank}.pth')
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp('ddp')
    spawn(worker, (folder,), nprocs=WORLD)
    return [torch.load(folder / f'rank{rank}.pth', weights_only=True) for rank in range(WORLD)]


def test_losses_and_their_gradients_are_those_of_all_tokens(ranks):
    first, second = (rank['losses'] for rank in ranks)
    for name, expected in losses_of_tokens().items():
        found = first[name]
        if name.endswith('gradient'):  # data-parallel training averages gradients
            found = (found + second[name]) / 2
        else:
            assert torch.equal(found, second[name])
        if not name.startswith('own'):
            torch.testing.assert_close(found, expected, msg=lambda m, n=name: f'{n}: {m}')
        elif name == 'own balance':
            # without `global_balance`, the mean of what ranks have alone: another number
            assert not torch.isclose(found, expected, rtol=1e-3)


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('name', TRAINED)
def test_processes_that_share_a_batch_train_as_one(ranks, name, mode):
    method, options = TRAINED[name]
    found = [rank[name][mode] for rank in ranks]
    for rank in found[1:]:
        torch.testing.assert_close(rank, found[0], rtol=0, atol=0)
    # sums of float32 in another order: of 1e-7 of the largest term each, and three steps that
    # carry them on
    expected = three_steps(make(method, **quiet(method, **options)), mode)
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize('name', TRAINED)
def test_ranks_stay_equal(ranks, name):
    method, options = TRAINED[name]
    first, second = (rank[name]['state'] for rank in ranks)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    start = make(method, **options).state_dict()
    unchanged = [name for name, value in first.items() if torch.equal(value, start[name])]
    assert 'head.weight' not in unchanged and 'blocks.1.mlp.experts.fc1.weight' not in unchanged
