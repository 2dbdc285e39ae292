"""Processes that share a batch, and experts that live on several of them.

Ranks take turns with samples, as all samplers of torch, timm and mmengine deal them: of S ranks,
rank r has the samples r, r + S, r + 2 S and so on of the joint batch. A last batch may be smaller
on the later ranks.

Where experts are shared out, rows travel to them and back: GShard (arXiv 2006.16668), section 3.2,
but with groups of any size. Sizes are read back once per layer: torch's all-to-all wants them on
the host.
Process m keeps experts m L to (m + 1) L - 1 as tensors of the type `DTensor`, which
torch.distributed.checkpoint saves under the names and shapes of one process.

Legend: T tokens of this rank, N tokens per sample, R rows sorted by expert, A rows that arrived, E
experts, L = E / M of each of M processes, D width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .config import check
from .experts import Experts, Stacked
from .kernels import Groups, make_plan


def rank_and_size() -> tuple[int, int]:
    """Which process this is, and of how many; (0, 1) without torch.distributed."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def joint_rows(num_tokens: int, tokens_per_sample: int, device: torch.device) -> Tensor:
    """Places (T,) int64, rising, of this rank's tokens, sample after sample, among all ranks'."""
    rows = torch.arange(num_tokens, device=device)
    rank, size = rank_and_size()
    if size == 1:
        return rows
    sample = torch.div(rows, tokens_per_sample, rounding_mode='floor')
    # sample s of this rank is number s * size + rank of all
    return rows + (sample * (size - 1) + rank) * tokens_per_sample


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of every rank's tensor, of one shape, without gradient; every rank has to ask."""
    total = values.detach().clone()
    if rank_and_size()[1] > 1:
        dist.all_reduce(total)
    return total


def place_experts(model: nn.Module, mesh: Any) -> None:
    """Leave to each process of a mesh of one dimension its experts of every layer, in place."""
    from torch.distributed.tensor import Shard, distribute_tensor

    # all processes hold the same model before, and call it as often as each other after
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, Experts)]
    for name, experts in layers:
        number, size = experts.num_experts, mesh.size()
        check(number % size == 0, f'experts of {name}', number, f'a multiple of {size} processes')
    for _, experts in layers:
        for part in experts.modules():
            if isinstance(part, Stacked):
                for name, whole in list(part.named_parameters()):
                    own = distribute_tensor(whole.detach(), mesh, [Shard(0)], src_data_rank=None)
                    setattr(part, name, nn.Parameter(own, whole.requires_grad))
                part.own = lambda whole: _MeanOverProcesses.apply(whole.to_local(), mesh.size())
        experts.exchange = Exchange(mesh.get_group(), mesh.size())


class _MeanOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> Tensor:
        ctx.size = size
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        # of the mean of all losses, as data-parallel training has it for other parameters
        return grads[0] / ctx.size, None


class Exchange:
    """Runs experts on the processes that hold them."""

    def __init__(self, group: dist.ProcessGroup, size: int) -> None:
        self.group, self.size = group, size

    def __call__(
        self, compute: Callable[[Tensor, Groups], Tensor], rows: Tensor, groups: Groups
    ) -> Tensor:
        """Run rows (R, D) of E experts; `compute` takes own ones (A, D), of L experts."""
        # no row only fills a group
        counts = groups.ends.diff(prepend=groups.ends.new_zeros(1))
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts, group=self.group)
        sent, received = torch.stack([counts, arriving]).view(2, self.size, -1).sum(dim=2).tolist()
        arrived = _Travel.apply(rows[: sum(sent)], sent, received, self.group)
        # they stand by process and then by expert
        num_experts = len(counts) // self.size
        experts = torch.arange(num_experts, device=rows.device).repeat(self.size)
        experts = experts.repeat_interleave(arriving, output_size=len(arrived))
        plan = make_plan(experts, num_experts, rows.dtype, dropped=False)
        answers = compute(arrived.index_select(0, plan.order), plan.groups)
        answers = answers.index_select(0, plan.inverse)
        back = _Travel.apply(answers, received, sent, self.group)
        return F.pad(back, (0, 0, 0, len(rows) - sum(sent)))  # past the last end


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
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        return _send(grads[0], *ctx.way_back), None, None, None


def _send(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    arrived = rows.new_empty(sum(received), rows.shape[1])
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=group)
    return arrived
