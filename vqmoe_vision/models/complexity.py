"""Parameters and multiply-accumulates of a vision transformer.

Counted by torch in a forward pass on the meta device; `moe.kernels.cpu` registers the experts.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..moe import MoeLayer
from ..moe.config import check
from ..moe.experts import SeparateLinear
from .hosts import Transformer


@dataclass(frozen=True)
class Complexity:
    """Size and cost of a model.

    Args:
        params: Number of parameters.
        active_params: Parameters that one token uses.
        macs: Multiply-accumulates per image at the model's input size, of matrix products. What a
            capacity drops counts as if it were computed.
    """

    params: int
    active_params: int
    macs: int

    def __str__(self) -> str:
        params = describe_params(self.params, self.active_params)
        return f'{params}, {self.macs / 1e9:.3f} GMACs per image'


def complexity(model: Transformer) -> Complexity:
    """Count parameters, active parameters and MACs of a timm ViT, dense or with MoE layers.

    Args:
        model: The model; its current input size counts.

    Raises:
        ValueError: If `model` is not a timm `VisionTransformer` or `Eva`, or has separate experts
            or quantized layers.
    """
    kind = type(model).__name__
    check(isinstance(model, Transformer), 'model', kind, 'a timm VisionTransformer or Eva')
    # kernels of both need numbers, which the meta device has not
    separate = any(isinstance(module, SeparateLinear) for module in model.modules())
    plain = has_plain_weights(model) and not separate
    check(plain, 'model', kind, 'one of float32 and stacked experts: count it before it is changed')
    stem: Any = model.patch_embed
    height, width = stem.img_size
    shape, dtype = (1, stem.proj.in_channels, height, width), stem.proj.weight.dtype
    images = torch.empty(shape, dtype=dtype, device='meta')
    memo: dict[int, torch.Tensor] = {id(b): b.to('meta') for b in model.buffers()}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(p.detach().to('meta'), p.requires_grad)
    weightless = copy.deepcopy(model, memo).eval()
    for module in weightless.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        weightless(images)
    return Complexity(*count_params(model), counter.get_total_flops() // 2)


def count_params(model: nn.Module) -> tuple[int, int]:
    """Parameters of a model, and those that one token uses."""
    params = sum(p.numel() for p in model.parameters())
    layers = [module for module in model.modules() if isinstance(module, MoeLayer)]
    return params, params - sum(layer.idle_params() for layer in layers)


def has_plain_weights(model: nn.Module) -> bool:
    """Whether all linear layers have weights of torch's own class; quantized ones have others."""
    linears = (module for module in model.modules() if isinstance(module, nn.Linear))
    return all(type(linear.weight) in (nn.Parameter, torch.Tensor) for linear in linears)


def describe_params(params: int, active: int) -> str:
    """Both counts in words."""
    return f'{params / 1e6:.2f}M parameters, {active / 1e6:.2f}M active'
