"""What a training step costs on N processes: bytes that one sends, bytes that one keeps, time.

Three ways: a whole model on each process (DDP), its parameters spread over all (FSDP2), and beside
FSDP2 one set of all experts spread over each M processes. Bytes that one process sends of b bytes:

    all-reduce       2 (N - 1) / N b    ring: a reduce-scatter and an all-gather
    all-gather         (N - 1) / N b    b of the whole that each process has in the end
    reduce-scatter     (N - 1) / N b    b of the whole that each process has before
    all-to-all         (M - 1) / M b    b of the rows of one process, at even load

after Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations"
(2009), which NCCL's documentation of its performance tests repeats. A step takes

    DDP         an all-reduce of the gradients
    FSDP2       an all-gather of a block's parameters in the forward and one in the backward pass,
                one of all other parameters, a reduce-scatter of the gradients: arXiv 2304.11277
    experts     the same, an expert's among the N / M groups alone; for the rows of a layer an
                all-to-all to the experts and one back, in both passes: GShard, arXiv 2006.16668
    codebooks   whatever the way, an all-reduce of counts and sums and one of the sampled tokens,
                and an all-gather of the draws of the sample

Left out: means of losses and counts of rows, some hundred bytes a layer, and what a barrier costs.

Legend: N processes, M of them share one set of experts, P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vqmoe_vision.models.sharding import spread_dimension
from vqmoe_vision.moe.codebooks.usage import SAMPLE_SIZE
from vqmoe_vision.moe.config import check

Shape = tuple[int, ...]
DDP, FSDP2 = 0, 1  # as values of `placed`; from 2 on it is M
_FLOAT = 4  # bytes; gradients are reduced in float32, and AdamW keeps two float32 numbers


@dataclass(frozen=True, kw_only=True)
class Block:
    """Shapes of parameters that are spread, of one block."""

    dense: tuple[Shape, ...]
    experts: tuple[Shape, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Network:
    """What of a network travels, is kept, or is computed."""

    blocks: tuple[Block, ...]
    rest: tuple[Shape, ...] = ()
    whole: int = 0
    codebooks: tuple[tuple[int, int], ...] = ()
    row_elements: float = 0
    macs: int = 0

    @property
    def params(self) -> int:
        """P."""
        blocks = [s for block in self.blocks for s in (*block.dense, *block.experts)]
        return self.whole + sum(math.prod(shape) for shape in (*blocks, *self.rest))


class Transfer(NamedTuple):
    """What one process sends in a step."""

    what: str
    among: str
    sent: float


def all_reduce(whole: float, processes: int) -> float:
    """Bytes that one process sends."""
    return 2 * (processes - 1) / processes * whole


def one_way(whole: float, processes: int) -> float:
    """Bytes that one process sends in an all-gather, a reduce-scatter or an even all-to-all."""
    return (processes - 1) / processes * whole


def part(shape: Sequence[int], processes: int) -> int:
    """Elements of a tensor that the first process has, and that each sends as its part."""
    cut = spread_dimension(shape, processes)
    sizes = [math.ceil(n / processes) if i == cut else n for i, n in enumerate(shape)]
    return math.prod(sizes)


def _whole(shapes: Iterable[Shape], processes: int) -> int:
    """Elements that travel for tensors, with what fills up the last parts."""
    return processes * sum(part(shape, processes) for shape in shapes)


def _own(shapes: Iterable[Shape], placed: int) -> list[Shape]:
    return [(shape[0] // placed, *shape[1:]) for shape in shapes]


def transfers(
    network: Network,
    placed: int,
    processes: int,
    images: int,
    parameter_bytes: int = 4,
    row_bytes: int = 4,
    reduce_scatters: float = 1,
) -> list[Transfer]:
    """What one process sends in a step."""
    found = [Transfer('codebooks', 'all', _codebooks(network, processes))]
    if placed == DDP:
        gradients = all_reduce(_FLOAT * network.params, processes)
        return [*found, Transfer('gradients', 'all', gradients)]
    found.append(Transfer('gradients', 'all', all_reduce(_FLOAT * network.whole, processes)))
    dense = [shape for block in network.blocks for shape in block.dense]
    experts = [shape for block in network.blocks for shape in block.experts]
    groups = processes // placed
    spread = [
        ('all', processes, dense, 2),
        ('all', processes, network.rest, 1),  # stays whole between the passes
        ('groups', groups, _own(experts, placed), 2),
    ]
    for among, size, shapes, gathers in spread:
        travels = one_way(_whole(shapes, size), size)
        found.append(Transfer('parameters', among, gathers * parameter_bytes * travels))
        found.append(Transfer('gradients', among, reduce_scatters * _FLOAT * travels))
    rows = 4 * one_way(row_bytes * network.row_elements * images, placed)
    return [*found, Transfer('rows', 'experts', rows)]


def _codebooks(network: Network, processes: int) -> float:
    summed = sum(codes * (width + 1) + SAMPLE_SIZE * width for codes, width in network.codebooks)
    draws = 8 * SAMPLE_SIZE * processes * len(network.codebooks)  # int64 of all processes
    return all_reduce(_FLOAT * summed, processes) + one_way(draws, processes)


class Memory(NamedTuple):
    """Bytes of one process, without activations."""

    parameters: int
    gradients: int
    state: int
    beside: int


def memory(network: Network, placed: int, processes: int, parameter_bytes: int = 4) -> Memory:
    """Bytes of the process that has most."""
    if placed == DDP:
        own, beside = network.params, _FLOAT * network.params
    else:
        groups = processes // placed
        own = network.whole + sum(part(shape, processes) for shape in network.rest)
        for block in network.blocks:
            own += sum(part(shape, processes) for shape in block.dense)
            own += sum(part(shape, groups) for shape in _own(block.experts, placed))
        blocks = [
            _whole(block.dense, processes) + _whole(_own(block.experts, placed), groups)
            for block in network.blocks
        ]
        largest = max(blocks)
        gathered = _whole(network.rest, processes) + 2 * largest
        beside = parameter_bytes * gathered + _FLOAT * largest
    return Memory(_FLOAT * own, _FLOAT * own, 2 * _FLOAT * own, beside)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Assumptions about machines; the defaults are figures of data sheets."""

    gpus: int = 8
    inside: float = 450e9
    between: float = 50e9
    flops: float = 989e12
    used: float = 0.4

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check(value > 0, name, value, 'above 0')


def seconds(
    sent: Iterable[Transfer], placed: int, processes: int, cluster: Cluster
) -> tuple[float, float]:
    """Time of transfers: of those that computing may hide, and of rows, which are waited for."""
    assert placed <= cluster.gpus, 'processes that share experts are on one machine'
    crosses = processes > cluster.gpus
    overlapping, waiting = 0.0, 0.0
    for transfer in sent:
        if transfer.among == 'experts':
            waiting += transfer.sent / cluster.inside
            continue
        rings = placed if transfer.among == 'groups' else 1
        link = cluster.between / rings if crosses else cluster.inside
        overlapping += transfer.sent / min(link, cluster.inside)
    return overlapping, waiting


def efficiency(
    network: Network,
    placed: int,
    processes: int,
    images: int,
    cluster: Cluster,
    parameter_bytes: int = 4,
    row_bytes: int = 4,
) -> tuple[float, float]:
    """Share of a step in which a GPU computes: at worst and at best."""
    sent = transfers(network, placed, processes, images, parameter_bytes, row_bytes)
    overlapping, waiting = seconds(sent, placed, processes, cluster)
    computing = 6 * network.macs * images / (cluster.used * cluster.flops)
    worst = computing / (computing + overlapping + waiting)
    return worst, computing / (max(computing, overlapping) + waiting)
