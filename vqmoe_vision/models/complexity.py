"""Parameters and multiply-accumulates of a vision transformer, counted by formula.

By formula, because the operators that run experts are opaque to counters, and because a formula
needs no forward pass: a model on the meta device is enough.

Legend: N tokens per image, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ..moe import MoeLayer


@dataclass(frozen=True)
class Complexity:
    """Size and cost of a model.

    Args:
        params: Number of parameters.
        active_params: Parameters that one token uses.
        macs: Multiply-accumulates per image at the model's input size. Matrix products only:
            norms, activations and biases are left out, as is usual, and so is what SimVQ computes
            once per batch.
    """

    params: int
    active_params: int
    macs: int

    def __str__(self) -> str:
        return (
            f'{self.params / 1e6:.2f}M parameters, {self.active_params / 1e6:.2f}M active, '
            f'{self.macs / 1e9:.3f} GMACs per image'
        )


def complexity(model: VisionTransformer) -> Complexity:
    """Count parameters, active parameters and MACs of a timm ViT, dense or with MoE layers.

    Args:
        model: The model; its current input size counts. Attention pooling heads are not counted.

    Raises:
        ValueError: If `model` is not a timm `VisionTransformer`.
    """
    if not isinstance(model, VisionTransformer):
        raise ValueError(
            f'model={type(model).__name__} is not possible: a timm VisionTransformer is expected'
        )
    params = sum(p.numel() for p in model.parameters())
    layers = [module for module in model.modules() if isinstance(module, MoeLayer)]
    num_patches = model.patch_embed.num_patches
    num_tokens = num_patches + model.num_prefix_tokens
    macs = num_patches * model.patch_embed.proj.weight.numel()
    macs += sum(_block_macs(block, num_tokens) for block in model.blocks)
    macs += _linear_macs(model.head)
    return Complexity(params, params - sum(layer.idle_params() for layer in layers), macs)


def _block_macs(block: Any, num_tokens: int) -> int:
    width = block.norm1.normalized_shape[0]
    attention = num_tokens * _linear_macs(block.attn) + 2 * num_tokens**2 * width
    if isinstance(block.mlp, MoeLayer):
        return attention + block.mlp.macs(num_tokens)
    return attention + num_tokens * _linear_macs(block.mlp)


def _linear_macs(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
