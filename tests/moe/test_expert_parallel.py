"""Experts on several processes against all experts on each: outputs and every gradient."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from vqmoe_vision.moe import METHODS, collect_losses
from vqmoe_vision.moe.distributed import place_experts
from vqmoe_vision.moe.experts import Experts

from ..forked import spawn
from ..groups import begin
from .conftest import D, OneLayer


def make(method: str) -> OneLayer:
    torch.manual_seed(0)
    return OneLayer(method).double().train()


def step(layer: OneLayer, x: Tensor) -> dict[str, Tensor]:
    """Outputs, and gradients of a sum that weighs every output differently."""
    torch.manual_seed(dist.get_rank())  # of noise
    x = x.clone().requires_grad_()
    with collect_losses(layer) as collected:
        out = layer(x)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        ((out * weights).sum() + collected.total()).backward()
    assert x.grad is not None
    grads = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {'out': out.detach(), 'x': x.grad, **grads}


def compare(rank: int, world: int, folder: Path, batches: list[int]) -> None:
    begin(rank, world, folder)
    mesh = init_device_mesh('cpu', (world,))
    found: dict[str, Any] = {}
    for method in METHODS:
        generator = torch.Generator().manual_seed(rank)
        x = torch.randn(batches[rank], 6, D, generator=generator, dtype=torch.double)
        whole, shared = make(method), make(method)
        place_experts(shared, mesh)
        expected, answer = step(whole, x), step(shared, x)
        for name, value in expected.items():
            if 'experts' in name:  # the mean over the processes
                dist.all_reduce(value)
                value = value.chunk(world)[rank] / world
                answer[name] = answer[name].to_local()
            # float64: sums in another order
            torch.testing.assert_close(answer[name], value, rtol=1e-9, atol=1e-12)
        found[method] = set(answer)
    torch.save(found, folder / f'rank{rank}.pth')
    dist.destroy_process_group()


@pytest.mark.long
@pytest.mark.parametrize('batches', [[3, 2], [1, 3, 2, 2]], ids=['2', '4'])
def test_equals_all_experts_on_each_process(batches, tmp_path):
    world = len(batches)
    spawn(compare, (world, tmp_path, batches), nprocs=world)
    found = torch.load(tmp_path / 'rank0.pth')
    assert set(found) == set(METHODS)
    assert all('layer.experts.fc1.weight' in names for names in found.values())


class Mesh:
    """As many processes as an error needs to know."""

    def size(self) -> int:
        return 3


def test_refuses_processes_that_do_not_divide_the_experts():
    layer = OneLayer('smoe')
    message = r'^experts of layer.experts=4'
    with pytest.raises(ValueError, match=message):
        place_experts(layer, Mesh())  # type: ignore[arg-type]
    assert all(m.exchange is None for m in layer.modules() if isinstance(m, Experts))
