"""Processes that share a batch: where the samples of this one stand in it, and sums over all.

Ranks take turns with samples, as all samplers of torch, timm and mmengine deal them: of S ranks,
rank r has the samples r, r + S, r + 2 S and so on of the joint batch. A last batch may be smaller
on the later ranks. Nothing here is read back from a device.

Legend: T tokens of this rank, N tokens per sample.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


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
