"""What a loss of a layer is made of, and its average over the processes that share a batch.

The average is one sum over ranks for all losses of all layers, of numbers without a gradient, after
the forward pass. In backward it could meet those of data-parallel training in another order on
another rank, and gradient checkpointing would repeat it.

Gradients are those of the whole batch once they are averaged over ranks, as DDP and FSDP do. With
n_r of N tokens on rank r of S, a mean m = sum_r n_r/N m_r and a loss F(m), the gradient is
sum_r n_r/N F'(m) dm_r. Here every rank has S n_r/N F'(m) dm_r.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .ranks import rank_and_size, sum_over_ranks


@dataclass(frozen=True)
class BalanceLoss:
    """A function of means over a batch's tokens: ranks average the means, not the values."""

    means: Tensor  # over tokens, float32 of any shape
    function: Callable[[Tensor], Tensor]
    weight: float = 1.0

    def __rmul__(self, weight: float) -> BalanceLoss:
        return BalanceLoss(self.means, self.function, weight * self.weight)

    def value(self) -> Tensor:
        """0-dim tensor, of the means as they are."""
        return self.value_of(self.means)

    def value_of(self, means: Tensor) -> Tensor:
        """0-dim tensor, of other means of the same shape."""
        return self.weight * self.function(means)


Loss = Tensor | BalanceLoss


def values_of(losses: Mapping[str, Loss]) -> dict[str, Tensor]:
    """Losses of the tokens of this process alone, 0-dim each."""
    return {name: _value(loss) for name, loss in losses.items()}


def _value(loss: Loss) -> Tensor:
    return loss.value() if isinstance(loss, BalanceLoss) else loss


def averaged_over_ranks(losses: Sequence[tuple[Loss, int]]) -> list[Tensor]:
    """Values, 0-dim, for the batch of all ranks, which ask with the same losses in one order."""
    size = rank_and_size()[1]
    if size == 1 or not losses:
        return [_value(loss) for loss, _ in losses]
    # each counts by its number of tokens, or of whatever its means are means over
    parts = []
    for loss, number in losses:
        values = (loss.means if isinstance(loss, BalanceLoss) else loss).flatten()
        # bfloat16 cannot count to 257
        parts.append(number * values.to(torch.promote_types(values.dtype, torch.float32)))
    own = torch.cat(parts)
    numbers = [own.new_full((1,), number) for _, number in losses]
    total = sum_over_ranks(torch.cat([own.detach(), *numbers]))
    sums, counts = total.split([own.numel(), len(losses)])
    # the value of all ranks, the gradient of this one
    sums = sums + size * (own - own.detach())
    averaged = []
    lengths = [part.numel() for part in parts]
    for (loss, _), part, count in zip(losses, sums.split(lengths), counts, strict=True):
        means = part / count.clamp(min=1)
        if isinstance(loss, BalanceLoss):
            averaged.append(loss.value_of(means.view_as(loss.means)))
        else:
            averaged.append(means.view_as(loss))
    return averaged
