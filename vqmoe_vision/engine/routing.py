"""Routing statistics over many batches: the honest count of dead experts."""

import torch
from mmengine.dist import all_reduce

from vqmoe_vision.moe.routing import perplexity

# Share of assignments per expert of a branch; VQMoE has two over the same experts.
_LOADS = ('load', 'discrete_load')


class RoutingStatistics:
    """Adds up expert loads and code usage per MoE layer over an epoch or a validation pass.

    An expert is dead when no branch of its layer assigned anything to it in all that time; an
    expert that one batch does not use is no such thing. Batches count alike, whatever their size.
    """

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, torch.Tensor]] = {}

    def reset(self) -> None:
        """Forgets everything."""
        self._sums = {}

    def add(self, stats: dict[str, torch.Tensor]) -> None:
        """Takes the statistics of one batch.

        Args:
            stats: As `Collected.stats`: `<layer>/load` and `<layer>/discrete_load` (E,) and
                `<layer>/code_usage` (M,) are used.
        """
        for name, value in stats.items():
            layer, _, kind = name.rpartition('/')
            if kind in (*_LOADS, 'code_usage'):
                sums = self._sums.setdefault(layer, {})
                value = value.detach().double()
                sums[kind] = sums[kind] + value if kind in sums else value

    def summary(self) -> dict[str, float]:
        """The statistics of everything added, over all ranks.

        Returns:
            Per layer `load_min`, `load_max` (shares, over all branches), `dead_experts`, and for a
            layer with a codebook `code_perplexity` and `codes_used`. Empty without MoE layers.
        """
        result: dict[str, float] = {}
        for layer, sums in self._sums.items():
            loads = [sums[kind] for kind in _LOADS if kind in sums]
            if loads:
                share = _share_over_ranks(torch.stack(loads).sum(dim=0))
                result[f'{layer}/load_min'] = share.min().item()
                result[f'{layer}/load_max'] = share.max().item()
                result[f'{layer}/dead_experts'] = (share == 0).sum().item()
            if 'code_usage' in sums:
                share = _share_over_ranks(sums['code_usage'])
                result[f'{layer}/code_perplexity'] = perplexity(share)
                result[f'{layer}/codes_used'] = (share > 0).sum().item()
        return result

    def report(self) -> list[str]:
        """One line per layer to read: `blocks.1.mlp  load 0.08..0.17  dead experts 0/8`."""
        summary = self.summary()
        lines = []
        for layer, sums in self._sums.items():
            text, counts = layer, {kind: len(value) for kind, value in sums.items()}
            if f'{layer}/dead_experts' in summary:
                experts = next(counts[kind] for kind in _LOADS if kind in counts)
                text += (
                    f'  load {summary[f"{layer}/load_min"]:.3f}..{summary[f"{layer}/load_max"]:.3f}'
                    f'  dead experts {summary[f"{layer}/dead_experts"]:.0f}/{experts}'
                )
            if f'{layer}/codes_used' in summary:
                text += (
                    f'  code perplexity {summary[f"{layer}/code_perplexity"]:.2f}'
                    f'  codes used {summary[f"{layer}/codes_used"]:.0f}/{counts["code_usage"]}'
                )
            lines.append(text)
        return lines


def _share_over_ranks(total: torch.Tensor) -> torch.Tensor:
    total = total.clone()
    all_reduce(total)
    return total / total.sum()
