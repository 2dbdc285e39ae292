"""Experts that live on several processes: each holds some, and rows travel to them and back.

GShard (arXiv 2006.16668), section 3.2, but with groups of any size, as in MegaBlocks (arXiv
2211.15841): the answer is that of all experts on one process. Routing and the weighted sum stay
where the tokens are. Sizes are read back once per layer: torch's all-to-all wants them on the host.

Process m keeps experts m L to (m + 1) L - 1 as `DTensor`s, which torch.distributed.checkpoint saves
under the names and shapes of one process. All processes hold the same model before `place_experts`,
and call it as often as each other after.

Legend: R rows sorted by expert, A rows that arrived, E experts, L = E / M of each of M processes,
D width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from .config import check
from .experts import Experts, StackedLinear
from .kernels import make_plan


def place_experts(model: nn.Module, mesh: DeviceMesh) -> None:
    """Leave to each process of a mesh of one dimension its experts of every layer, in place."""
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, Experts)]
    for name, experts in layers:
        check(
            experts.num_experts % mesh.size() == 0,
            f'number of experts of {name}',
            experts.num_experts,
            f'it must be a multiple of {mesh.size()}, the number of processes that share them',
        )
    for _, experts in layers:
        for linear in experts.modules():
            if isinstance(linear, StackedLinear):
                _distribute(linear, mesh)
        experts.exchange = Exchange(mesh.get_group(), mesh.size())


def _distribute(linear: StackedLinear, mesh: DeviceMesh) -> None:
    for name, whole in list(linear.named_parameters()):
        own = distribute_tensor(whole.detach(), mesh, [Shard(0)], src_data_rank=None)
        setattr(linear, name, nn.Parameter(own, whole.requires_grad))
    linear.own = partial(_own, mesh.size())


def _own(size: int, parameter: Tensor) -> Tensor:
    assert isinstance(parameter, DTensor)
    own: Tensor = _MeanOverProcesses.apply(parameter.to_local(), size)
    return own


class _MeanOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> Tensor:
        ctx.size = size
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # of the mean of all losses, as data-parallel training has it for other parameters
        return grads[0] / ctx.size, None


class Exchange:
    """Runs experts on the processes that hold them."""

    def __init__(self, group: dist.ProcessGroup, size: int) -> None:
        self.group, self.size = group, size

    def __call__(
        self, compute: Callable[[Tensor, Tensor], Tensor], rows: Tensor, offsets: Tensor
    ) -> Tensor:
        """Run rows (R, D) with ends (E,) int32; `compute` takes own ones (A, D), with ends (L,)."""
        # no row only fills a group
        counts = offsets.diff(prepend=offsets.new_zeros(1))
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts, group=self.group)
        both = torch.stack([counts, arriving]).view(2, self.size, -1).sum(dim=2)
        sent, received = both.tolist()
        arrived = self._travel(rows[: sum(sent)], sent, received)
        answers = _compute_mixed(compute, arrived, arriving.view(self.size, -1))
        back = self._travel(answers, received, sent)
        return F.pad(back, (0, 0, 0, len(rows) - sum(sent)))  # past the last end

    def _travel(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        travelled: Tensor = _Travel.apply(rows, sent, received, self.group)
        return travelled


# torch's own is deprecated, and its successor is not public
class _Travel(torch.autograd.Function):
    """Rows (..., D) to the processes in their order, and theirs to this one; gradients back."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.way_back = received, sent, group
        return _send(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _send(grads[0], *ctx.way_back), None, None, None


def _send(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    arrived = rows.new_empty(sum(received), rows.shape[1])
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=group)
    return arrived


def _compute_mixed(
    compute: Callable[[Tensor, Tensor], Tensor], rows: Tensor, counts: Tensor
) -> Tensor:
    """Run experts on rows that stand by process and then by expert; counts (M, L)."""
    num_experts = counts.shape[1]
    experts = torch.arange(num_experts, device=rows.device).repeat(len(counts))
    experts = experts.repeat_interleave(counts.flatten(), output_size=len(rows))
    plan = make_plan(experts, num_experts, rows.dtype)
    answers = compute(rows.index_select(0, plan.order), plan.offsets)
    return answers.index_select(0, plan.inverse)
