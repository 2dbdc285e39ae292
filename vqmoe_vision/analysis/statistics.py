"""Numbers about routing: over a data set instead of a batch, and per token instead of on average.

Legend: B images, N tokens per image, E experts, K experts per token.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vqmoe_vision.moe import collect_losses, moe_layers
from vqmoe_vision.moe.codebook import Quantized
from vqmoe_vision.moe.routing import Routing


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
    sums: dict[str, Tensor] = {}
    count = 0
    with _evaluating(model):
        for images in batches:
            with collect_losses(model, update_state=False) as collected:
                model(images)
            for name, value in collected.stats.items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value * len(images)
            count += len(images)
    if not count:
        raise ValueError('batches: empty, there is nothing to average over')
    return {name: value / count for name, value in sums.items()}


def token_experts(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Asks every router and every codebook of a model which experts each token goes to.

    Args:
        model: Holds the MoE layers; it runs in eval mode and is left as it was.
        images: (B, C, H, W), normalised as in training.

    Returns:
        By the name of the module that decides, such as 'blocks.1.mlp.router': (B, N, K) expert
        indices, best first, -1 where a token has fewer than the others; N counts class and register
        tokens too.

    Raises:
        ValueError: If no layer sends tokens to experts. SoftMoE does not: each of its experts sees
            mixtures of all tokens.
    """
    found: dict[str, Tensor] = {}

    def keep(name: str, num_experts: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: object) -> None:
            if isinstance(output, Routing):
                num_tokens = args[0].numel() // args[0].shape[-1]
                experts = _by_token(output, num_tokens)
            elif isinstance(output, Quantized):
                experts = output.indices[:, None] % num_experts  # code j belongs to expert j mod E
            else:
                return
            found[name] = experts.unflatten(0, (len(images), -1))

        return hook

    hooks = []
    for layer_name, layer in moe_layers(model).items():
        for name, module in layer.named_modules():
            hook = keep(f'{layer_name}.{name}', layer.experts.num_experts)
            hooks.append(module.register_forward_hook(hook))
    try:
        with _evaluating(model):
            model(images)
    finally:
        for handle in hooks:
            handle.remove()
    if not found:
        raise ValueError('model: has no router that sends tokens to experts')
    return found


def _by_token(routing: Routing, num_tokens: int) -> Tensor:
    """Experts of each token (T, K), best first, filled up with -1."""
    if routing.tokens is None:
        return routing.indices
    # assignments by token, and by weight within a token: both sorts keep the order of equals
    order = routing.weights.argsort(descending=True, stable=True)
    order = order[routing.tokens[order].argsort(stable=True)]
    tokens = routing.tokens[order]
    counts = tokens.bincount(minlength=num_tokens)
    place = torch.arange(len(tokens), device=tokens.device) - (counts.cumsum(0) - counts)[tokens]
    experts = counts.new_full((num_tokens, int(counts.max())), -1)
    experts[tokens, place] = routing.indices[order]
    return experts


def patch_experts(model: VisionTransformer, images: Tensor) -> dict[str, Tensor]:
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
    rows, columns = model.patch_embed.dynamic_feat_size(images.shape[-2:])
    prefix = model.num_prefix_tokens
    return {
        name: experts[:, prefix:, 0].unflatten(1, (rows, columns))
        for name, experts in token_experts(model, images).items()
    }


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}  # parts may be frozen in eval
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
