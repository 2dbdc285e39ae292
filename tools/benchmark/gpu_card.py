"""What a card can do, and what a step would take on it, by launches, operations and bytes.

A step takes the sum over its operators of the longest of three: a launch, its products at the rate
of large ones, its bytes at the rate of a copy. These are measured on the card.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .timing import Clock

LARGE = 8192  # rows and columns of the products that a card is measured by
REPEATS = 5
CHAIN = 100  # operators without work
IDLE = ('empty', 'new_empty', 'detach', 'lift_fresh')  # beginnings of names: nothing is launched


@dataclass(frozen=True)
class Card:
    flops: Mapping[torch.dtype, float]  # a second, of products
    bytes: float  # a second, read and written
    launch: float  # seconds from one operator of a training to the next

    def expected_ms(self, work: 'Work') -> float:
        return 1e3 * sum(
            max(self.launch, flops / self.flops.get(dtype, torch.inf), moved / self.bytes)
            for flops, dtype, moved in work.operators
        )


class Work(TorchDispatchMode):
    """Products, their dtype and the bytes of each operator that runs inside, backward too."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[tuple[int, torch.dtype, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        answer = func(*args, **kwargs)
        space, _, name = func.name().partition('::')
        if func.is_view or space == 'profiler' or name.startswith(IDLE):
            return answer
        given, made = _tensors((args, kwargs)), _tensors(answer)
        made = made or given * func._schema.is_mutable  # lists that are written in place
        count = flop_registry.get(func._overloadpacket)
        flops = count(*args, **kwargs, out_val=answer) if count else 0
        dtype = next((t.dtype for t in given if t.is_floating_point()), torch.float32)
        self.operators.append((flops, dtype, sum(map(_bytes, given + made))))
        return answer


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _bytes(tensor: Tensor) -> int:
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())  # of an expanded one few are there


def work_of(step: Callable[[], object]) -> Work:
    with Work() as work:
        step()
    return work


def measure_card(device: str, large: int = LARGE) -> Card:
    """Rates of a device; a second or two."""
    clock, flops = Clock('wall', device), {}

    def seconds(call: Callable[[], object]) -> float:
        call()
        return min(clock.time(call) for _ in range(REPEATS)) / 1e3

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        matrix = torch.randn(large, large, device=device).to(dtype)
        flops[dtype] = 2 * large**3 / seconds(partial(torch.mm, matrix, matrix))
    source, target = torch.zeros(2, large, large, device=device)
    moved = 2 * source.nbytes / seconds(lambda: target.copy_(source))
    number = torch.ones((), device=device, requires_grad=True)

    def chain() -> None:
        reduce(lambda value, _: value * 1.0, range(CHAIN), number).backward()

    return Card(flops, moved, seconds(chain) / len(work_of(chain).operators))


def profiled(step: Callable[[], object], device: str) -> dict[str, float]:
    """Launches of a step on a card, and milliseconds of the host and of the card."""
    if not device.startswith('cuda'):
        return {}
    host = Clock('wall', 'cpu').time(step)  # until the last launch
    torch.cuda.synchronize()
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        step()
        torch.cuda.synchronize()
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    spent = sum(event.self_device_time_total for event in events) / 1e3
    return {'launches': len(events), 'host_ms': host, 'device_ms': spent}


def spoil_memory(device: str) -> None:
    """Leaves nan in memory that the next tensors get: what reads before it writes shows."""
    most = 23 if device.startswith('cuda') else 13  # 2**23 numbers have 32 MiB
    sizes = [2**power for power in range(7, most + 1) for _ in range(8)]
    _ = [torch.full((size,), torch.nan, device=device) for size in sizes]
