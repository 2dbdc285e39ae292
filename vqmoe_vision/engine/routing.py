"""Routing statistics over many batches: the honest count of experts that nothing reaches."""

import torch
from mmengine.dist import all_reduce

from vqmoe_vision.moe.statistics import describe, summarize


class RoutingStatistics:
    """Averages what MoE layers report over an epoch, a validation pass, or between two log lines.

    An expert is unused when nothing was assigned to it in all that time; an expert that one batch
    does not use is no such thing. Batches count alike, whatever their size. Nothing is read from
    the device before somebody asks.
    """

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}

    def reset(self) -> None:
        """Forgets everything."""
        self._sums, self._counts = {}, {}

    def add(self, stats: dict[str, torch.Tensor]) -> None:
        """Takes the statistics of one batch.

        Args:
            stats: As `Collected.stats`: `<layer>/<name>` to a scalar, or to a share per expert or
                code.
        """
        for name, value in stats.items():
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def means(self) -> dict[str, torch.Tensor]:
        """Averages over everything added, on all ranks, by name; empty without MoE layers."""
        return {
            name: _mean_over_ranks(total / self._counts[name]) for name, total in self._sums.items()
        }

    def summary(self) -> dict[str, float]:
        """The averages as numbers: `<layer>/load_max` and so on, see `moe.statistics.summarize`."""
        return summarize(self.means())

    def report(self) -> list[str]:
        """One line per layer to read: `blocks.1.mlp  load 0.083..0.172 ... unused 0/8`."""
        by_layer: dict[str, dict[str, torch.Tensor]] = {}
        for name, value in self.means().items():
            layer, _, kind = name.rpartition('/')
            by_layer.setdefault(layer, {})[kind] = value
        return [f'{layer}  {describe(stats)}' for layer, stats in by_layer.items()]


def _mean_over_ranks(value: torch.Tensor) -> torch.Tensor:
    value = value.clone()
    all_reduce(value, op='mean')
    return value
