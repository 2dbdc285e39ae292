"""What changes between the checkpoints of one training: who goes where, and the parameters.

Legend: B images, N tokens per image, S checkpoints, P parameters.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vqmoe_vision.moe import moe_layers

from . import measures
from .record import decided


@dataclass(frozen=True)
class Change:
    """How the routing of the same tokens differs between two checkpoints of a run."""

    before: str
    after: str
    shares: dict[str, float]  # of tokens with another first expert, by decider


@dataclass(frozen=True)
class Convergence:
    """How much of their way the parts of the layers have left at the checkpoints of a run."""

    checkpoints: list[str]  # titles, oldest first
    parts: dict[str, dict[str, list[float]]]  # as `convergence`


def routing_changes(
    before: nn.Module, after: nn.Module, batches: Iterable[Tensor]
) -> dict[str, float]:
    """Share of tokens with another first expert later in one training, by decider."""
    changed: dict[str, float] = {}
    count = 0
    for images in batches:
        old, new = (decided(model, images) for model in (before, after))
        for name, experts in old.items():
            share = measures.changed_share(experts[..., 0], new[name][..., 0])
            changed[name] = changed.get(name, 0.0) + share * len(images)
        count += len(images)
    if not count:
        raise ValueError('batches: empty, there is nothing to look at')
    return {name: total / count for name, total in changed.items()}


def layer_states(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what `convergence` looks at: parameters and buffers of layers with experts."""
    layers = tuple(f'{name}.' for name in moe_layers(model))
    return {
        name: value.detach().cpu().clone()
        for name, value in model.state_dict().items()
        if name.startswith(layers)
    }


def convergence(
    checkpoints: Sequence[Mapping[str, Tensor]], layers: Iterable[str]
) -> dict[str, dict[str, list[float]]]:
    """How near the parts of every layer are to what they will be: Theorem 4.1 as a measurement."""
    parts: dict[str, list[str]] = {}
    for layer in layers:
        for name, value in checkpoints[0].items():
            # counters and flags are no parameters
            if name.startswith(f'{layer}.') and value.is_floating_point():
                part = name.removeprefix(f'{layer}.').split('.')[0]
                parts.setdefault(f'{layer}.{part}', []).append(name)
    found = {}  # 'blocks.1.mlp.router': a number for each checkpoint, oldest first
    for part, names in parts.items():
        trajectory = torch.stack([_flat(state, names) for state in checkpoints])
        found[part] = {
            'similarity': measures.similarity_to_last(trajectory).tolist(),
            'distance': measures.distance_to_last(trajectory).tolist(),
        }
    return found


def _flat(state: Mapping[str, Tensor], names: list[str]) -> Tensor:
    return torch.cat([state[name].detach().float().cpu().flatten() for name in names])
