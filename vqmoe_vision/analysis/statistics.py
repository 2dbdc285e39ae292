"""Numbers about routing: over a data set instead of a batch, and per token instead of on average.

Legend: B images, N tokens per image, E experts, K experts per token.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from vqmoe_vision.models.layers import Transformer
from vqmoe_vision.moe import collect_losses
from vqmoe_vision.moe.config import check

from .record import decided, evaluating, on_patches


def mean_statistics(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Averages what the MoE layers report over batches of images, in eval mode.

    Args:
        model: Holds the MoE layers; it is left as it was.
        batches: Images (B, C, H, W), normalised as in training.

    Returns:
        The statistics of `collect_losses` by their name: 'blocks.1.mlp/load' is the (E,) share of
        assignments per expert. An image counts the same whatever batch it is in.

    Raises:
        ValueError: If there is no batch.
    """
    sums: dict[str, Any] = defaultdict(int)
    count = 0
    with evaluating(model):
        for images in batches:
            with collect_losses(model, update_state=False) as collected:
                model(images)
            for name, value in collected.stats.items():
                sums[name] += value * len(images)
            count += len(images)
    check(count > 0, 'batches', count, 'at least one image to average over')
    return {name: value / count for name, value in sums.items()}


def token_experts(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Asks every router and every codebook of a model which experts each token goes to.

    Args:
        model: Holds the MoE layers; it runs in eval mode and is left as it was.
        images: (B, C, H, W), normalised as in training.

    Returns:
        By the name of the module that decides, such as 'blocks.1.mlp.router': (B, N, K) expert
        indices on the CPU, best first, -1 where a token has fewer than the others; N counts class
        and register tokens too.

    Raises:
        ValueError: If no layer sends tokens to experts. SoftMoE does not: each of its experts sees
            mixtures of all tokens.
    """
    found = decided(model, images)
    if not found:
        raise ValueError('model: has no router that sends tokens to experts')
    return found


def patch_experts(model: Transformer, images: Tensor) -> dict[str, Tensor]:
    """Maps the first choice of every patch, as a picture needs it.

    Args:
        model: Holds the MoE layers; it is left as it was.
        images: (B, C, H, W), normalised as in training.

    Returns:
        By the name of the module that decides: (B, rows, columns) expert indices, -1 for a patch
        that no expert takes.

    Raises:
        ValueError: If no layer sends tokens to experts.
    """
    return {
        name: on_patches(model, images, experts[..., 0])
        for name, experts in token_experts(model, images).items()
    }
