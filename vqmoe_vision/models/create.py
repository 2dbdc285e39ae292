"""`timm.create_model` as the tasks call it: one line for a mistake, and the options of a row."""

from __future__ import annotations

from contextlib import nullcontext
from difflib import get_close_matches
from functools import partial
from typing import Any

import timm
import torch
from timm.layers import Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ..moe.config import check
from .arguments import check_patches, check_vit_arguments, moe_options, named_failures
from .saved import record_arguments


def create_model(
    model_name: str, moe: dict[str, Any] | None = None, extra_mlps: int = 0, **kwargs: Any
) -> nn.Module:
    """`timm.create_model`, with errors that name what was asked for.

    Args:
        model_name: Name of a timm model.
        moe: Options of the MoE layers: `moe_layers`, and those of the method. A dense model takes
            None.
        extra_mlps: Widens all MLPs of a dense model, by in all what so many further MLPs per token
            would cost.
        **kwargs: Its keyword arguments.

    Raises:
        ValueError: There is no such model, or the arguments do not go together.
        TypeError: The model does not know one of the keyword arguments.
    """
    if not timm.is_model(model_name):
        nearest = get_close_matches(model_name, timm.list_models(), 1)
        hint = f'did you mean {nearest[0]}?' if nearest else 'timm.list_models() lists them'
        raise ValueError(f'model_name={model_name!r} is not a timm model; {hint}')
    kwargs = {name: value for name, value in kwargs.items() if value is not None}  # as timm does
    _check_moe(model_name, moe, kwargs)
    kwargs.update(moe or {})
    build = partial(_untrained, model_name)
    # one of this package's models says itself which option is wrong
    dense = _method_of(model_name) is None
    if dense and timm.models.is_model_in_modules(model_name, ('vision_transformer',)):
        check_vit_arguments(kwargs)
    with named_failures(build, kwargs) if dense else nullcontext():
        if extra_mlps:
            kwargs['mlp_ratio'] = _wider(model_name, extra_mlps, kwargs)
        model = timm.create_model(model_name, **kwargs)
    check_patches(model, kwargs)
    record_arguments(model, kwargs)
    return model


def _untrained(model_name: str, **kwargs: Any) -> nn.Module:
    return timm.create_model(model_name, **{**kwargs, 'pretrained': False, 'checkpoint_path': ''})


def _check_moe(model_name: str, moe: dict[str, Any] | None, kwargs: dict[str, Any]) -> None:
    """Refuses options that the model would not have, or that are given twice."""
    if moe is None:
        return
    method = _method_of(model_name)
    check(method is not None, 'moe', moe, f'{model_name} is dense, which takes moe=None')
    check(isinstance(moe, dict), 'moe', moe, 'a dictionary of options, or None')
    assert method is not None
    names = moe_options(method)
    for name, value in moe.items():
        allowed = f'the options of {model_name} are {", ".join(sorted(names))}'
        check(name in names, f'moe.{name}', value, allowed)
        check(name not in kwargs, name, kwargs.get(name), f'moe.{name}={value!r} is set, change it')


def _method_of(model_name: str) -> str | None:
    """Key of `METHODS` of one of this package's models, None of any other."""
    if not timm.models.is_model_in_modules(model_name, ('vit_moe',)):
        return None
    return model_name.partition('.')[0].rpartition('_')[2]


def _wider(model_name: str, extra_mlps: int, kwargs: dict[str, Any]) -> float:
    """The `mlp_ratio` that spreads `extra_mlps` over all blocks."""
    valid = isinstance(extra_mlps, int) and extra_mlps > 0
    check(valid, 'extra_mlps', extra_mlps, 'a whole number, at least 0')
    with torch.device('meta'):  # for depth and ratio only: no memory, no random numbers
        model: Any = _untrained(model_name, **kwargs)
    blocks: Any = model.blocks if isinstance(model, VisionTransformer) else []
    mlps = [block.mlp for block in blocks if isinstance(getattr(block, 'mlp', None), Mlp)]
    dense = len(mlps) == len(blocks) > 0
    check(dense, 'extra_mlps', extra_mlps, f'0, {model_name} is no dense vision transformer')
    ratio = mlps[0].fc1.out_features / mlps[0].fc1.in_features
    return ratio * (len(mlps) + extra_mlps) / len(mlps)
