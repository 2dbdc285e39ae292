"""What processes on this machine send and keep in a training step, counted in two ways.

Operators of torch.distributed are counted by the tensors they are given, each with the formula of
its ring; DDP's reducer, which is not written in Python, is given a hook that does the same by such
operators. And the system is asked how much went through the sockets of a process, which holds the
formulas themselves against what gloo does.
"""

from __future__ import annotations

import inspect
import os
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from vqmoe_vision.models.sharding import shard_model
from vqmoe_vision.moe import collect_losses, update_state

from .scaling_costs import DDP, all_reduce, one_way

WARM_UP = 2  # steps: codebooks start in the first, and DDP orders its buckets anew in the second


class Measured(NamedTuple):
    """One way."""

    counted: dict[str, float]
    sockets: float | None
    kept: tuple[int, ...]


def measure(
    build: Callable[[], Any], ways: Sequence[int], processes: int, images: int
) -> list[Measured]:
    """Take training steps in each way, on the CPU."""
    with TemporaryDirectory() as folder:
        mp.spawn(_run, (build, ways, processes, images, Path(folder)), nprocs=processes)
        ranks = [torch.load(Path(folder) / f'{rank}.pth') for rank in range(processes)]
    return [_joined(of_ranks) for of_ranks in zip(*ranks, strict=True)]


def _joined(ranks: Sequence[tuple[dict[str, float], int | None, tuple[int, ...]]]) -> Measured:
    counted, sockets, kept = zip(*ranks, strict=True)
    mean = {name: sum(c[name] for c in counted) / len(ranks) for name in counted[0]}
    through = None if None in sockets else sum(sockets) / len(ranks)
    return Measured(mean, through, tuple(max(values) for values in zip(*kept, strict=True)))


def _run(
    rank: int,
    build: Callable[[], Any],
    ways: Sequence[int],
    processes: int,
    images: int,
    folder: Path,
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group('gloo', f'file://{folder}/init', rank=rank, world_size=processes)
    torch.save([_measure_way(build, placed, images) for placed in ways], folder / f'{rank}.pth')
    dist.destroy_process_group()


def _measure_way(
    build: Callable[[], Any], placed: int, images: int
) -> tuple[dict[str, float], int | None, tuple[int, ...]]:
    torch.manual_seed(0)  # the same model on all processes
    model = build().train()
    if placed == DDP:
        # as tools/train.py has it: layers add up their buffers themselves
        options = inspect.signature(DistributedDataParallel).parameters
        sync = 'forward_sync_buffers' if 'forward_sync_buffers' in options else 'broadcast_buffers'
        buffers_stay: dict[str, Any] = {sync: False}
        call: Any = DistributedDataParallel(model, **buffers_stay)
        call.register_comm_hook(None, allreduce_hook)
    else:
        call = shard_model(model, placed)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    torch.manual_seed(dist.get_rank())
    for _ in range(WARM_UP):
        train_step(call, model, images)
        optimizer.step()
        optimizer.zero_grad()
    dist.barrier()
    before = sent_by_sockets()
    with CollectiveCounter() as counter:
        train_step(call, model, images)
    dist.barrier()
    after = sent_by_sockets()
    through = None if before is None or after is None else after - before
    return counter.sent, through, _kept(model, optimizer)


def _kept(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, ...]:
    parameters = list(model.parameters())
    gradients = [p.grad for p in parameters if p.grad is not None]
    state = [s[name] for s in optimizer.state.values() for name in ('exp_avg', 'exp_avg_sq')]
    return tuple(_own_bytes(tensors) for tensors in (parameters, gradients, state))


def _own_bytes(tensors: Sequence[Tensor]) -> int:
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)


def train_step(call: nn.Module, model: Any, images: int) -> None:
    """Forward, backward, and what learns without gradients, on random images."""
    size = model.patch_embed.img_size
    with collect_losses(model, update_state=False) as collected:
        logits = call(torch.randn(images, 3, *size))
        labels = torch.randint(logits.shape[1], (images,))
        (F.cross_entropy(logits, labels) + collected.total()).backward()
    update_state(model)


class CollectiveCounter(TorchDispatchMode):
    """Adds up what this process sends in the collectives that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, float] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == 'c10d':
            name = func._schema.name.removeprefix('c10d::')
            self.sent[name] = self.sent.get(name, 0.0) + _SENT[name](*args)
        return func(*args, **(kwargs or {}))


def _rows_to_others(
    arriving: Tensor, leaving: Tensor, group: Any, received: list[int], sent: list[int], *_: Any
) -> float:
    group = dist.ProcessGroup.unbox(group)
    own = sent[group.rank()] if sent else len(leaving) // group.size()
    return leaving[own:].nbytes


# What a process sends, of the arguments of an operator; one that is not here is an error. Groups of
# fewer processes than all are told by the sizes of parts and wholes.
_SENT: dict[str, Callable[..., float]] = {
    'allreduce_': lambda tensors, *_: sum(
        all_reduce(t.nbytes, dist.get_world_size()) for t in tensors
    ),
    '_allgather_base_': lambda whole, part, *_: one_way(
        whole.nbytes, whole.numel() // part.numel()
    ),
    'allgather_': lambda outputs, inputs, *_: sum(
        one_way(sum(t.nbytes for t in whole), len(whole)) for whole in outputs
    ),
    '_reduce_scatter_base_': lambda part, whole, *_: one_way(
        whole.nbytes, whole.numel() // part.numel()
    ),
    'alltoall_base_': _rows_to_others,
    'barrier': lambda *_: 0.0,
}

# bytes_sent in the kernel's struct tcp_info, since Linux 4.19
_BYTES_SENT = 200


def sent_by_sockets() -> int | None:
    """Bytes that this process has sent through the TCP sockets that it has open."""
    if sys.platform != 'linux':
        return None
    total = 0
    for number in os.listdir('/proc/self/fd'):
        try:
            connection = socket.socket(fileno=os.dup(int(number)))
        except OSError:  # closed meanwhile, or no socket
            continue
        with connection:
            if connection.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            if connection.type != socket.SOCK_STREAM:
                continue
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_SENT + 8)
            if len(info) < _BYTES_SENT + 8:
                return None
            total += struct.unpack_from('=Q', info, _BYTES_SENT)[0]
    return total
