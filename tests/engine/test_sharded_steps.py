"""Steps of a spread model as a GPU takes them, as far as processes on a CPU can show it."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import optimizer as optimizers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vqmoe_vision import collect_losses
from vqmoe_vision.engine.sharded import _exchange
from vqmoe_vision.models.sharding import shard_model
from vqmoe_vision.moe.experts import Experts

from ..forked import spawn
from ..groups import begin
from ..variants import VARIANTS

TINY = {'img_size': 16, 'patch_size': 8, 'depth': 2, 'embed_dim': 16, 'num_heads': 2}


class Mixtures(TorchDispatchMode):
    """Operators that are given floating tensors of several dtypes, which those of CUDA refuse."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.ndim > 0]
        dtypes = {x.dtype for x in tensors if x.is_floating_point()}
        if len(dtypes) > 1 and 'copy' not in func.name():
            self.found.add(func.name())
        return func(*args, **(kwargs or {}))


def make(method: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(f'vit_tiny_{method}', num_classes=4, **{**TINY, **options})


def take_steps(rank: int, world: int, folder: Path) -> None:
    begin(rank, world, folder)
    # as on a GPU, where torch takes kernels for lists of tensors unasked
    optimizers._get_foreach_kernels_supported_devices = lambda: ['cpu', 'cuda']
    for name, (method, options) in VARIANTS.items():
        model = make(method, **options)
        optimizer = torch.optim.AdamW(model.parameters())
        before = dict(model.named_parameters())
        shard_model(model, param_dtype=torch.bfloat16)
        _exchange(optimizer, before, dict(model.named_parameters()))
        with collect_losses(model) as collected:
            with Mixtures() as mixtures:
                logits = model(torch.randn(4, 3, 16, 16))
            collected.add({'task': F.cross_entropy(logits.float(), torch.arange(4))}, 4)
            collected.total().backward()
        optimizer.step()
        assert not mixtures.found, f'{name}: {mixtures.found}'
    dist.destroy_process_group()


def test_every_method_takes_a_step_in_bfloat16(tmp_path: Path) -> None:
    spawn(take_steps, (2, tmp_path), nprocs=2)


def wait(rank: int, world: int, folder: Path) -> None:
    begin(rank, world, folder)
    model = make('smoe', num_experts=4)
    shard_model(model, expert_processes=2, timeout=77)
    layers = [layer for layer in model.modules() if isinstance(layer, Experts)]
    for layer in layers:
        groups = [layer.exchange.group, layer.fc1.weight.device_mesh.get_group('groups')]
        for group in groups:
            assert group.size() == 2
            backend = group._get_backend(torch.device('cpu'))
            assert backend.options._timeout == timedelta(seconds=77)
    assert layers
    dist.destroy_process_group()


def test_processes_that_share_experts_wait_as_long_as_all(tmp_path: Path) -> None:
    spawn(wait, (4, tmp_path), nprocs=4)
