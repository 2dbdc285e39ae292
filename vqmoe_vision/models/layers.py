"""MoE layers as a model takes them: experts like the MLPs in whose place they stand."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import register_notrace_module
from timm.models.eva import Eva
from timm.models.vision_transformer import get_init_weights_vit
from torch import nn

from ..moe.config import MoeConfig, check
from ..moe.experts import Experts
from ..moe.layer import MoeLayer
from ..moe.methods import METHODS
from ..moe.raw_patches import Host, RawPatches


@torch.no_grad()
def scale_fresh_experts(model: nn.Module) -> None:
    """Scale the output layers of experts that were just drawn, if timm does so with MLPs."""
    if not (isinstance(model, Eva) or getattr(model, 'fix_init', False)):
        return
    blocks: Any = model.blocks
    for i, block in enumerate(blocks):
        if isinstance(block.mlp, MoeLayer):
            block.mlp.experts.fc2.weight.div_(output_scale(i))


def output_scale(block: int) -> float:
    """What timm divides the output layers of a block by when it scales them by depth."""
    return float((2.0 * (block + 1)) ** 0.5)


def host_of(model: Any, raw_patches: RawPatches) -> Host:
    """What a layer may know of the model that it is built for."""
    stem, prefix_tokens = model.patch_embed, model.num_prefix_tokens
    num_tokens = stem.num_patches + prefix_tokens
    return Host(num_tokens, prefix_tokens, stem.proj.in_channels, raw_patches)


def mlp_ratio_of(features: int, width: int) -> float:
    """Ratio by which timm gives an MLP as many hidden features."""
    ratio = features / width
    # timm rounds the product down: the next number above the quotient is always enough
    possible = (round(ratio, 4), ratio, math.nextafter(ratio, math.inf))
    return next(r for r in possible if int(width * r) == features)


def build_layer(
    method: str,
    config: MoeConfig,
    host: Host,
    width: int,
    mlp_ratio: float,
    act_layer: Callable[[], nn.Module] = nn.GELU,
    bias: bool = True,
    drop: float = 0.0,
    weight_init: str = '',
    *,
    patch_drop_rate: float,
    **factory: Any,
) -> MoeLayer:
    """MoE layer of a method with experts that are like the MLPs of its model."""
    ratio = config.expert_mlp_ratio or mlp_ratio
    hidden = int(width * ratio)
    check(hidden >= 1, 'expert_mlp_ratio', ratio, 'wide enough for one hidden feature')
    experts = Experts(config.num_experts, width, hidden, act_layer, bias, drop, **factory)
    if weight_init:
        set_draw(experts, weight_init)
        for linear in (experts.fc1, experts.fc2):
            linear.init_weights()
    layer = METHODS[method].build(width, config, experts, host, **factory)
    anywhere = layer.permutation_equivariant
    allowed = f'0, as {method} needs all patches of an image in their places'
    check(anywhere or patch_drop_rate == 0, 'patch_drop_rate', patch_drop_rate, allowed)
    # torch.fx, which timm's feature extraction uses, takes it as one operation
    register_notrace_module(type(layer))
    return layer


def set_draw(experts: Experts, weight_init: str) -> None:
    """Lets experts be drawn as timm draws MLPs."""
    # of which timm asks whether it is of an MLP
    draw = partial(get_init_weights_vit(weight_init), name='mlp') if weight_init else None
    experts.fc1.draw = experts.fc2.draw = draw
