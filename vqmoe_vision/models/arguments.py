"""Checks of what a user asks of a model, and where its MoE layers go."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from typing import Any

from timm.layers import Mlp, to_2tuple
from timm.models.vision_transformer import VisionTransformer

from ..moe.config import check
from ..moe.methods import METHODS


def resolve_moe_layers(moe_layers: str | Sequence[int], depth: int) -> tuple[int, ...]:
    """Indices of the blocks that hold an MoE layer.

    Args:
        moe_layers: 'every2' for blocks 1, 3, 5, ... (V-MoE), 'everyN' in general; 'last2' for the
            last two of every second block (V-MoE's 'Last 2'), 'lastN' in general; or indices.
        depth: Number of blocks.

    Raises:
        ValueError: If the specification is not understood or selects no or missing blocks.
    """
    allowed = f"'everyN', 'lastN', or block indices, that select blocks of depth={depth}"
    chosen: Sequence[int]
    if isinstance(moe_layers, str):
        match = re.fullmatch(r'(every|last)([1-9]\d*)', moe_layers)
        check(match is not None, 'moe_layers', moe_layers, allowed)
        assert match is not None
        kind, count = match[1], int(match[2])
        every_second = range(depth)[1::2]
        check(kind == 'every' or count <= len(every_second), 'moe_layers', moe_layers, allowed)
        chosen = every_second[-count:] if kind == 'last' else range(depth)[count - 1 :: count]
    else:
        check(isinstance(moe_layers, Sequence), 'moe_layers', moe_layers, allowed)
        check(all(type(i) is int for i in moe_layers), 'moe_layers', moe_layers, allowed)
        chosen = sorted(set(moe_layers))
    possible = len(chosen) > 0 and all(0 <= i < depth for i in chosen)
    check(possible, 'moe_layers', moe_layers, allowed)
    return tuple(chosen)


def moe_options(method: str) -> set[str]:
    """Names of the arguments that a model of a method has beyond timm's.

    Args:
        method: Key of `METHODS`.
    """
    return {'moe_layers', *METHODS[method].config.option_names()}


def check_names(names: Iterable[str], method: str) -> None:
    """Refuse an argument that neither timm's vision transformer nor the method has.

    Args:
        names: Names of the arguments that are no options of the method.
        method: Key of `METHODS`.

    Raises:
        TypeError: As Python does for such an argument; lists the options.
    """
    known = inspect.signature(VisionTransformer).parameters
    for name in names:
        if name not in known:
            raise TypeError(
                f"{name!r} is neither an argument of timm's VisionTransformer nor an option of "
                f'{method}, which are {", ".join(sorted(moe_options(method)))}'
            )


def check_vit_arguments(kwargs: dict[str, Any]) -> None:
    """Say in one line what timm would assert, ignore or cut off.

    Raises:
        ValueError: For arguments that cannot work together.
    """
    dim, heads = kwargs.get('embed_dim', 768), kwargs.get('num_heads', 12)
    check(dim >= 1, 'embed_dim', dim, 'at least 1')
    check(heads >= 1 and dim % heads == 0, 'num_heads', heads, f'a divisor of embed_dim={dim}')
    for name, possible, allowed in (
        ('scale_mlp_norm', (None, False), 'False, experts have no norm between their layers'),
        ('mlp_layer', (None, Mlp), "timm's Mlp, whose layout experts have"),
    ):
        check(kwargs.get(name) in possible, name, kwargs.get(name), allowed)
    image, patch = to_2tuple(kwargs.get('img_size', 224)), to_2tuple(kwargs.get('patch_size', 16))
    check(min(patch) >= 1, 'patch_size', kwargs.get('patch_size', 16), 'at least 1')
    check(min(image) >= 1, 'img_size', kwargs.get('img_size', 224), 'at least 1')
    fits = all(size % part == 0 for size, part in zip(image, patch, strict=True))
    check(
        fits or bool(kwargs.get('dynamic_img_pad') and kwargs.get('dynamic_img_size')),
        'img_size',
        kwargs.get('img_size', 224),
        f'a multiple of patch_size={patch[0]}x{patch[1]}, or any with both '
        'dynamic_img_size=True and dynamic_img_pad=True',
    )
