"""Routing statistics over many batches: the honest count of experts that nothing reaches."""

from functools import lru_cache

import torch
from mmengine.dist import all_gather_object, all_reduce

from vqmoe_vision.moe.collect import describe, summarize

Layout = tuple[tuple[str, torch.Size], ...]  # names and shapes of statistics, in their order


class Batch:
    """The statistics of one batch as one tensor, so that many of them cost few operations."""

    def __init__(self, stats: dict[str, torch.Tensor]) -> None:
        self.layout: Layout = tuple((name, value.shape) for name, value in stats.items())
        parts = [value.detach().reshape(-1) for value in stats.values()]
        if len({part.dtype for part in parts}) > 1:
            parts = [part.double() for part in parts]  # the wider of two dtypes may not hold both
        flat = torch.cat(parts).double()
        owners = _owners(self.layout, flat.device)
        good = flat.isfinite()
        bad = flat.new_zeros(len(parts)).index_add_(0, owners, (~good).double())
        self.finite = (bad == 0).double()  # (S,), of each statistic
        self.values = torch.where(self.finite[owners] == 1, flat, 0.0)  # (N,), of all in a row


@lru_cache(maxsize=8)
def _owners(layout: Layout, device: torch.device) -> torch.Tensor:
    """(N,) index of the statistic that each value belongs to; copying it there would wait."""
    sizes = [shape.numel() for _, shape in layout]
    return torch.cat([torch.full((n,), i, device=device) for i, n in enumerate(sizes)])


class RoutingStatistics:
    """Averages what MoE layers report over an epoch, a validation pass, or between two log lines.

    An expert is unused when nothing was assigned to it in all that time; an expert that one batch
    does not use is no such thing. Batches count alike, whatever their size; a value that is not
    finite is left out. Nothing is read from the device before somebody asks.
    """

    def __init__(self) -> None:
        # of each layout, the sums (N,) and counts (S,) of batches; a model has one, as a rule
        self._totals: dict[Layout, tuple[torch.Tensor, torch.Tensor]] = {}

    def reset(self) -> None:
        """Forgets everything."""
        self._totals = {}

    def state_dict(self) -> dict[str, dict[str, torch.Tensor]]:
        """What was added so far, for a checkpoint, on the CPU like all else in one."""
        sums, counts = self._by_name()
        return {
            'sums': {name: value.to('cpu', copy=True) for name, value in sums.items()},
            'counts': {name: value.to('cpu', copy=True) for name, value in counts.items()},
        }

    def load_state_dict(
        self, state: dict[str, dict[str, torch.Tensor]], device: torch.device
    ) -> None:
        """Goes on from a `state_dict`.

        Args:
            state: What `state_dict` gave.
            device: Of what will be added.
        """
        sums = state['sums']
        self._totals = {}
        if sums:
            layout = tuple((name, value.shape) for name, value in sums.items())
            flat = torch.cat([value.reshape(-1).to(device) for value in sums.values()])
            counts = torch.stack([state['counts'][name].to(device) for name in sums])
            self._totals[layout] = flat, counts

    def add(self, stats: dict[str, torch.Tensor]) -> None:
        """Takes the statistics of one batch, as `Collected.stats`."""
        if stats:
            self.add_batch(Batch(stats))

    def add_batch(self, batch: Batch) -> None:
        """As `add`, of what is joined already because others take it too."""
        if batch.layout not in self._totals:
            self._totals[batch.layout] = batch.values, batch.finite
            return
        sums, counts = self._totals[batch.layout]
        self._totals[batch.layout] = sums + batch.values, counts + batch.finite

    def _by_name(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Sums in their shapes, and 0-dim counts."""
        all_sums: dict[str, torch.Tensor] = {}
        all_counts: dict[str, torch.Tensor] = {}
        for layout, (sums, counts) in self._totals.items():
            parts = sums.split([shape.numel() for _, shape in layout])
            for (name, shape), part, count in zip(layout, parts, counts, strict=True):
                all_sums[name] = all_sums.get(name, 0.0) + part.view(shape)
                all_counts[name] = all_counts.get(name, 0.0) + count
        return all_sums, all_counts

    def means(self) -> dict[str, torch.Tensor]:
        """Averages over everything added, on all ranks, by name; empty without MoE layers.

        Every rank has to ask. Ranks may have seen different statistics, or none.
        """
        shapes: dict[str, torch.Size] = {}
        own_sums, own_counts = self._by_name()
        for of_rank in all_gather_object({name: v.shape for name, v in own_sums.items()}):
            shapes |= of_rank
        if not shapes:
            return {}
        device = next((value.device for value in own_sums.values()), None)
        sums = [own_sums.get(n, torch.zeros(s, device=device)) for n, s in shapes.items()]
        counts = [own_counts.get(n, torch.zeros((), device=device)) for n in shapes]
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
        """The averages as numbers: `<layer>/load_max` and so on, see `moe.collect.summarize`."""
        return summarize(self.means())


def lines_of(means: dict[str, torch.Tensor]) -> list[str]:
    """One line per layer: `blocks.1.mlp load 0.083..0.172 perplexity 7.71 unused 0/8`."""
    by_layer: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in means.items():
        layer, _, kind = name.rpartition('/')
        by_layer.setdefault(layer, {})[kind] = value
    return [f'{layer}  {describe(stats)}' for layer, stats in by_layer.items()]
