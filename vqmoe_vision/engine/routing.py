"""Routing statistics over many batches: the honest count of experts that nothing reaches."""

import torch
from mmengine.dist import all_gather_object, all_reduce

from vqmoe_vision.moe.statistics import describe, summarize


class RoutingStatistics:
    """Averages what MoE layers report over an epoch, a validation pass, or between two log lines.

    An expert is unused when nothing was assigned to it in all that time; an expert that one batch
    does not use is no such thing. Batches count alike, whatever their size; a value that is not
    finite is left out. Nothing is read from the device before somebody asks.
    """

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, torch.Tensor] = {}

    def reset(self) -> None:
        """Forgets everything."""
        self._sums, self._counts = {}, {}

    def state_dict(self) -> dict[str, dict[str, torch.Tensor]]:
        """What was added so far, for a checkpoint."""
        return {'sums': dict(self._sums), 'counts': dict(self._counts)}

    def load_state_dict(
        self, state: dict[str, dict[str, torch.Tensor]], device: torch.device
    ) -> None:
        """Goes on from a `state_dict`.

        Args:
            state: What `state_dict` gave.
            device: Of what will be added.
        """
        self._sums = {name: value.to(device) for name, value in state['sums'].items()}
        self._counts = {name: value.to(device) for name, value in state['counts'].items()}

    def add(self, stats: dict[str, torch.Tensor]) -> None:
        """Takes the statistics of one batch.

        Args:
            stats: As `Collected.stats`: `<layer>/<name>` to a scalar, or to a share per expert or
                code.
        """
        for name, value in stats.items():
            value = value.detach().double()
            finite = value.isfinite().all()
            value = torch.where(finite, value, 0.0)
            if name in self._sums:
                value = value + self._sums[name]
                finite = finite + self._counts[name]
            self._sums[name], self._counts[name] = value, finite.double()

    def means(self) -> dict[str, torch.Tensor]:
        """Averages over everything added, on all ranks, by name; empty without MoE layers.

        Every rank has to ask. Ranks may have seen different statistics, or none.
        """
        shapes: dict[str, torch.Size] = {}
        for of_rank in all_gather_object({name: v.shape for name, v in self._sums.items()}):
            shapes |= of_rank
        if not shapes:
            return {}
        device = next((value.device for value in self._sums.values()), None)
        sums = [self._sums.get(n, torch.zeros(s, device=device)) for n, s in shapes.items()]
        counts = [self._counts.get(n, torch.zeros((), device=device)) for n in shapes]
        # one reduction for all
        flat = torch.cat([value.double().reshape(-1) for value in (*sums, *counts)])
        all_reduce(flat)
        parts = flat.split([value.numel() for value in (*sums, *counts)])
        return {
            name: total.view(shape) / count.view(()).clamp(min=1)
            for (name, shape), total, count in zip(
                shapes.items(), parts[: len(sums)], parts[len(sums) :], strict=True
            )
        }

    def summary(self) -> dict[str, float]:
        """The averages as numbers: `<layer>/load_max` and so on, see `moe.statistics.summarize`."""
        return summarize(self.means())


def lines_of(means: dict[str, torch.Tensor]) -> list[str]:
    """One line per layer: `blocks.1.mlp  load 0.083..0.172 perplexity 7.71 unused 0/8`.

    Args:
        means: By name, as `RoutingStatistics.means`.
    """
    by_layer: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in means.items():
        layer, _, kind = name.rpartition('/')
        by_layer.setdefault(layer, {})[kind] = value
    return [f'{layer}  {describe(stats)}' for layer, stats in by_layer.items()]
