"""Groups of processes over gloo.

Each is kept for as long as its process lives. Otherwise the last to let go of a group may be the
reducer of DistributedDataParallel, which waits for the threads of gloo and holds the interpreter's
lock meanwhile. A thread that has to free what belongs to Python waits for that lock: a deadlock,
once in some thousand groups, that no timeout of a test ends (pytorch/pytorch#56297).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_KEPT: list[Any] = []


def begin(rank: int, world: int, folder: str | Path) -> None:
    """Joins a group as one of several processes, each with one thread, that meet in a folder."""
    torch.set_num_threads(1)
    dist.init_process_group('gloo', f'file://{folder}/init', rank=rank, world_size=world)
    _KEPT.append(dist.group.WORLD)


@contextmanager
def alone() -> Iterator[None]:
    """A group of this process and no other."""
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    _KEPT.append(dist.group.WORLD)
    try:
        yield
    finally:
        dist.destroy_process_group()
