"""What changes between the checkpoints of one training: who goes where, and the parameters.

Legend: B images, N tokens per image, S checkpoints, P parameters.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vqmoe_vision.moe import moe_layers
from vqmoe_vision.moe.config import check

from . import measures
from .record import decided


@dataclass(frozen=True)
class Change:
    """How the routing of the same tokens differs between two checkpoints of a run."""

    before: str
    after: str
    shares: dict[str, float]  # of tokens with another first expert, by decider


def routing_changes(
    before: nn.Module, after: nn.Module, batches: Iterable[Tensor]
) -> dict[str, float]:
    """Share of tokens with another first expert later in one training, by decider."""
    changed: dict[str, float] = defaultdict(float)
    count = 0
    for images in batches:
        old, new = (decided(model, images) for model in (before, after))
        for name, experts in old.items():
            share = measures.changed_share(experts[..., 0], new[name][..., 0])
            changed[name] += share * len(images)
        count += len(images)
    check(count > 0, 'batches', count, 'at least one image to look at')
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
    parts: dict[str, list[str]] = defaultdict(list)
    for layer in layers:
        for name, value in checkpoints[0].items():
            # counters and flags are no parameters
            if name.startswith(f'{layer}.') and value.is_floating_point():
                parts[f'{layer}.{name.removeprefix(f"{layer}.").split(".")[0]}'].append(name)
    found = {}  # 'blocks.1.mlp.router': a number for each checkpoint, oldest first
    for part, names in parts.items():
        values = [[s[n].detach().float().cpu().flatten() for n in names] for s in checkpoints]
        trajectory = torch.stack([torch.cat(of_state) for of_state in values])
        found[part] = {
            'similarity': measures.similarity_to_last(trajectory).tolist(),
            'distance': measures.distance_to_last(trajectory).tolist(),
        }
    return found
