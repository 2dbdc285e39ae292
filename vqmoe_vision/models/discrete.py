"""A model that is already there, of which only the discrete branch is kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..moe import moe_layers as layers_of
from ..moe.config import check
from ..moe.layer import MoeLayer
from .moe_vit import SparseModel


def changeable_layers(model: nn.Module) -> list[MoeLayer]:
    """The MoE layers of a model whose parameters are about to change, or go."""
    is_model = isinstance(model, nn.Module)
    check(is_model, 'model', type(model).__name__, 'a model with MoE layers and its weights')
    layers = list(layers_of(model).values())
    check(len(layers) > 0, 'model', type(model).__name__, 'a model with MoE layers')
    for module in model.modules():
        wrapped = isinstance(module, DistributedDataParallel)
        check(not wrapped, 'model', type(module).__name__, 'one that is not wrapped yet')
    return layers


def to_discrete(model: nn.Module) -> nn.Module:
    """Keep the discrete branch of every MoE layer alone: for fine-tuning and serving.

    The answers are those of the full model whose gates give the discrete branch all the weight.
    Call it before an optimizer takes the parameters.

    Args:
        model: Any model whose MoE layers have both branches, before it is distributed. It is
            changed in place and returned, or left as it is if a layer refuses.

    Raises:
        ValueError: A layer has no discrete branch, or as `changeable_layers`.
    """
    layers = changeable_layers(model)
    for layer in layers:
        layer.check_discrete()
    # nothing is refused from here on
    changed: dict[str, Any] = {}
    for layer in layers:
        changed |= layer.to_discrete()
    for module in model.modules():
        if isinstance(module, SparseModel):
            module.moe_config = replace(module.moe_config, **changed)
            module._model_args = {**module._model_args, **changed}
    return model
