"""Models spread over processes against the same models on each, under DDP.

The same batches and draws on both sides: gradients of two steps, what is saved, how much of the
model each process has.
"""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from vqmoe_vision.models.sharding import blocks_of, shard_model
from vqmoe_vision.moe import METHODS, collect_losses, start_training, update_state

from .. import cases
from ..forked import spawn
from ..groups import begin
from .conftest import WITH_GATE


def make(method: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    size = {'img_size': 16, 'patch_size': 8, 'embed_dim': 16, 'depth': 2, 'num_heads': 2}
    options = {**size, 'num_experts': 4, 'num_classes': 10, **options}
    model = timm.create_model(f'vit_tiny_{method}', **options).train()
    start_training(model, 10)  # the first stage of StableMoE ends with the first step
    return model


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    # linear in the gradients: Adam would make rounding errors of tiny gradients as large as others
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)


class Sums(TorchDispatchMode):
    """Counts sums over all processes."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.c10d.allreduce_.default
        return func(*args, **(kwargs or {}))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> list[int]:
    found = []
    for number in range(steps):
        torch.manual_seed(10 * number + dist.get_rank())
        size = 4 - dist.get_rank() % 2  # another on every second process
        images = torch.randn(size, 3, 16, 16, dtype=next(model.parameters()).dtype)
        targets = torch.randint(10, (size,))
        with collect_losses(model, update_state=False) as collected:
            loss = F.cross_entropy(model(images), targets) + collected.total()
            optimizer.zero_grad()
            with Sums() as sums:
                loss.backward()
            found.append(sums.count)
        optimizer.step()
        update_state(model)
    return found


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    return states.get_model_state_dict(model, options=states.StateDictOptions(full_state_dict=True))


def compare(rank: int, world: int, expert_processes: int, num_experts: int, folder: Path) -> None:
    begin(rank, world, folder)
    forms: list = [*((method, {}) for method in METHODS)]
    forms += [('smoe', WITH_GATE[gate]) for gate in ('first', 'separate')]
    quiet = {'router_noise': 0.0, 'load_weight': 0.0}
    forms += [('smoe', {'preset': 'shared', 'score': 'sigmoid', **quiet})]
    for method, options in forms:
        whole = DistributedDataParallel(make(method, num_experts=num_experts, **options).double())
        train(whole, optimizer_of(whole))
        model = make(method, num_experts=num_experts, **options).double()
        sharded = shard_model(model, expert_processes)
        # of what each process has whole; StableMoE's router learns in the first step alone
        whole_ones = [p for p in sharded.parameters() if not isinstance(p, DTensor)]
        wanted = any(p.requires_grad for p in whole_ones)
        sums = train(sharded, optimizer_of(sharded))
        assert sums[0] == wanted >= sums[1], (method, sums)
        expected, found = whole.module.state_dict(), whole_state(sharded)
        if rank == 0:  # alone has all of it
            assert list(found) == list(expected)
            for name, value in expected.items():
                # experts sum the tokens of all processes at once, DDP those of each; codebooks and
                # routers compute in float32, whose last digit a sum in another order may move
                torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)
    dist.destroy_process_group()


@cases(
    'world, expert_processes, num_experts',
    pytest.param(2, 1, 4, id='2'),
    pytest.param(2, 2, 4, id='2-experts'),
    pytest.param(4, 1, 4, id='4', marks=pytest.mark.long),
    pytest.param(4, 2, 4, id='4-experts', marks=pytest.mark.long),
    # fewer experts than processes
    pytest.param(4, 1, 2, id='4-of-2', marks=pytest.mark.long),
    pytest.param(4, 2, 2, id='4-experts-of-2', marks=pytest.mark.long),
)
def test_learns_what_ddp_learns(world, expert_processes, num_experts, tmp_path):
    spawn(compare, (world, expert_processes, num_experts, tmp_path), nprocs=world)


def test_blocks_inside_of_others_come_first():
    inner = [nn.Sequential(nn.Linear(2, 2), nn.GELU()) for _ in range(2)]
    stage = nn.ModuleDict({'blocks': nn.Sequential(*inner)})
    # a feed-forward network of mmcv
    network = nn.ModuleDict({'layers': nn.Sequential(nn.Linear(2, 2), nn.GELU())})
    model = nn.ModuleDict({'layers': nn.ModuleList([stage]), 'head': network})
    assert blocks_of(model) == [inner[1], inner[0], stage]


def own_bytes(tensors: list[Any]) -> int:
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)


def save(rank: int, world: int, expert_processes: int, folder: Path) -> None:
    begin(rank, world, folder)
    # fewer experts than four processes
    model = make('vqmoe', embed_dim=64, num_experts=2)
    in_all = own_bytes(list(model.parameters()))
    shard_model(model, expert_processes)
    optimizer = optimizer_of(model)
    train(model, optimizer)
    parameters = list(model.parameters())
    kept = [own_bytes(parameters), own_bytes([p.grad for p in parameters if p.grad is not None])]
    kept.append(own_bytes([s['momentum_buffer'] for s in optimizer.state.values()]))
    assert all(own < in_all * (1 / world + 0.1) for own in kept)
    weights, steps = states.get_state_dict(model, optimizer)
    dcp.save({'model': weights, 'optimizer': steps}, checkpoint_id=folder / 'saved')
    state = whole_state(model)
    if rank == 0:
        torch.save(state, folder / 'whole.pth')
    dist.destroy_process_group()


def load(rank: int, world: int, expert_processes: int, folder: Path, saved: Path) -> None:
    if world > 1:
        begin(rank, world, folder)
    model = make('vqmoe', embed_dim=64, num_experts=2)
    model = shard_model(model, expert_processes) if world > 1 else model
    optimizer = optimizer_of(model)
    weights, steps = states.get_state_dict(model, optimizer)
    parts = {'model': weights, 'optimizer': steps}
    dcp.load(parts, checkpoint_id=saved / 'saved', no_dist=world == 1)
    states.set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=steps)
    assert all('momentum_buffer' in state for state in optimizer.state.values())
    state, expected = whole_state(model), torch.load(saved / 'whole.pth')
    assert rank > 0 or all(torch.equal(state[name], value) for name, value in expected.items())
    if world > 1:
        dist.destroy_process_group()


@pytest.mark.filterwarnings('ignore:torch.distributed is disabled:UserWarning')  # one process
@cases(
    'before, after',
    pytest.param((2, 1), (1, 1), id='2-to-1'),
    pytest.param((2, 2), (4, 1), id='2-experts-to-4', marks=pytest.mark.long),
    pytest.param((4, 2), (2, 1), id='4-experts-to-2', marks=pytest.mark.long),
    pytest.param((4, 1), (2, 2), id='4-to-2-experts', marks=pytest.mark.long),
)
def test_saved_in_one_layout_and_loaded_in_another(before, after, tmp_path):
    for name in 'ab':
        (tmp_path / name).mkdir()
    spawn(save, (*before, tmp_path / 'a'), nprocs=before[0])
    arguments = (*after, tmp_path / 'b', tmp_path / 'a')
    spawn(load, arguments, nprocs=after[0]) if after[0] > 1 else load(0, *arguments)
