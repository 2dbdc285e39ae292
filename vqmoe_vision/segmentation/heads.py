"""Configs of necks and heads, completed with what follows from the backbone before them."""

import inspect
from typing import Any

from mmseg.registry import MODELS
from torch import nn

from vqmoe_vision.moe.config import check

from .backbone import TimmViT


def check_decode_head(head: Any) -> None:
    """Refuses what a segmentor of this package cannot feed."""
    if not isinstance(head, dict):
        types = [one.get('type') for one in head]
        allowed = 'one head, as there are no cascades here; others are model.auxiliary_head=[...]'
        check(False, 'model.decode_head', types, allowed)
    allowed = 'a head of feature maps; this one reads a class token beside each of them'
    check(head.get('type') != 'DPTHead', 'model.decode_head.type', 'DPTHead', allowed)


def completed_neck(neck: dict[str, Any], backbone: TimmViT) -> dict[str, Any]:
    """A neck's config with what follows from the backbone."""
    width = backbone.model.embed_dim
    levels = [width] * len(backbone.out_indices)
    return _completed(neck, in_channels=levels, out_channels=width, embed_dim=width)


def completed_head(
    head: dict[str, Any], backbone: TimmViT, neck: nn.Module | None, num_classes: int | None
) -> dict[str, Any]:
    """A head's config with what follows from backbone and neck."""
    model: Any = backbone.model
    width = getattr(neck, 'out_channels', model.embed_dim)
    index = head.get('in_index', -1)
    return _completed(
        head,
        in_channels=width if isinstance(index, int) else [width] * len(index),
        channels=width,
        embed_dims=width,
        num_heads=model.blocks[0].attn.num_heads,
        num_classes=num_classes,
    )


def _completed(config: dict[str, Any], **values: Any) -> dict[str, Any]:
    """A config with those of `values` that it lacks and its class cannot be built without."""
    kind = MODELS.get(config['type']) if isinstance(config.get('type'), str) else None
    if kind is None:  # the registry says what is wrong
        return config
    parameters: dict[str, inspect.Parameter] = {}
    for base in kind.__mro__:  # each hands on to the next what it has no name for
        own = inspect.signature(base.__init__).parameters
        parameters = {**own, **parameters}
        if not any(p.kind is p.VAR_KEYWORD for p in own.values()):
            break
    needed = {n for n, p in parameters.items() if p.default is p.empty}
    return {**{name: value for name, value in values.items() if name in needed}, **config}
