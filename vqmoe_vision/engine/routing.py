"""Routing statistics over many batches: the honest count of dead experts."""

import torch
from mmengine.dist import all_reduce


class RoutingStatistics:
    """Adds up expert loads and code usage per MoE layer over an epoch or a validation pass.

    An expert is dead when nothing was assigned to it in all that time; an expert that one batch
    does not use is no such thing. Batches count alike, whatever their size.
    """

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def reset(self) -> None:
        """Forgets everything."""
        self._sums = {}

    def add(self, stats: dict[str, torch.Tensor]) -> None:
        """Takes the statistics of one batch.

        Args:
            stats: As `Collected.stats`: `<layer>/load` (E,) and `<layer>/code_usage` (M,) are used.
        """
        for name, value in stats.items():
            if name.rpartition('/')[2] in ('load', 'code_usage'):
                value = value.detach().double()
                self._sums[name] = self._sums[name] + value if name in self._sums else value

    def summary(self) -> dict[str, float]:
        """The statistics of everything added, over all ranks.

        Returns:
            Per layer `load_min`, `load_max` (shares), `dead_experts`, and for a layer with a
            codebook `code_perplexity` and `codes_used`. Empty if there is no MoE layer.
        """
        result: dict[str, float] = {}
        for name, total in self._sums.items():
            total = total.clone()
            all_reduce(total)
            layer, _, kind = name.rpartition('/')
            share = total / total.sum()
            if kind == 'load':
                result[f'{layer}/load_min'] = share.min().item()
                result[f'{layer}/load_max'] = share.max().item()
                result[f'{layer}/dead_experts'] = (share == 0).sum().item()
            else:
                entropy = -torch.special.xlogy(share, share).sum()
                result[f'{layer}/code_perplexity'] = entropy.exp().item()
                result[f'{layer}/codes_used'] = (share > 0).sum().item()
        return result

    def report(self) -> list[str]:
        """One line per layer to read, for example `blocks.1.mlp  load 0.08..0.17  dead 0/8`."""
        summary = self.summary()
        lines: dict[str, str] = {}
        for name, total in self._sums.items():
            layer, _, kind = name.rpartition('/')
            if kind == 'load':
                text = (
                    f'load {summary[f"{layer}/load_min"]:.3f}..{summary[f"{layer}/load_max"]:.3f}'
                    f'  dead experts {summary[f"{layer}/dead_experts"]:.0f}/{len(total)}'
                )
            else:
                text = (
                    f'code perplexity {summary[f"{layer}/code_perplexity"]:.2f}'
                    f'  codes used {summary[f"{layer}/codes_used"]:.0f}/{len(total)}'
                )
            lines[layer] = f'{lines.get(layer, layer)}  {text}'
        return list(lines.values())
