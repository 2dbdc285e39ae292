"""Statistics of a layer as numbers for a log: one vocabulary for loops, logs, curves and pictures.

A statistic is a detached tensor under a name. A scalar keeps its name; a share per expert or code,
such as `load`, becomes `load_min`, `load_max`, `load_unused` and `load_perplexity`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .routing import perplexity


def summarize(stats: Mapping[str, Tensor]) -> dict[str, float]:
    """Numbers of 0-dim tensors, and of shares (E,) or (M,), with one wait for their device."""
    summary: dict[str, float] = {}
    if not stats:
        return summary
    flat = torch.cat([value.reshape(-1).double() for value in stats.values()]).cpu()
    sizes = [value.numel() for value in stats.values()]
    for (name, value), numbers in zip(stats.items(), flat.split(sizes), strict=True):
        if value.ndim == 0:
            summary[name] = numbers.item()
            continue
        summary |= {
            f'{name}_min': numbers.min().item(),
            f'{name}_max': numbers.max().item(),
            f'{name}_unused': float((numbers == 0).sum()),
            f'{name}_perplexity': perplexity(numbers),
        }
    return summary


def describe(stats: Mapping[str, Tensor]) -> str:
    """The same in words, for a line of a log; scalars that are zero are left out."""
    numbers = summarize(stats)
    parts = []
    for name, value in stats.items():
        if value.ndim > 0:
            parts.append(
                f'{name} {numbers[f"{name}_min"]:.3f}..{numbers[f"{name}_max"]:.3f}'
                f' perplexity {numbers[f"{name}_perplexity"]:.2f}'
                f' unused {numbers[f"{name}_unused"]:.0f}/{value.numel()}'
            )
        elif numbers[name]:
            parts.append(f'{name} {numbers[name]:.3g}')
    return '  '.join(parts)
