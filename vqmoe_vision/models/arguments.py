"""Checks of what a user asks of a model, and where its MoE layers go."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, get_type_hints

import torch
from timm.layers import Mlp, to_2tuple
from timm.layers.create_act import _ACT_LAYER_DEFAULT
from timm.layers.create_norm import _NORM_MAP
from timm.models.vision_transformer import ATTN_LAYERS, VisionTransformer
from torch import nn

from ..moe.config import check, check_type, did_you_mean
from ..moe.methods import METHODS

# timm's names of layers, by the options that take one
_LAYERS: dict[str, dict[str, Any]] = {
    'act_layer': _ACT_LAYER_DEFAULT,
    'norm_layer': _NORM_MAP,
    'embed_norm_layer': _NORM_MAP,
    'attn_layer': ATTN_LAYERS,
}
_TYPES = get_type_hints(VisionTransformer.__init__)
# counts of what a model can do without; all others are at least 1
_MAY_BE_ZERO = ('num_classes', 'reg_tokens')

# what timm and torch raise for an argument that they cannot work with
FAILURES = (
    ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip

# Which blocks hold an MoE layer unless a model is told otherwise.
MOE_LAYERS = 'every2'


def resolve_moe_layers(moe_layers: str | Sequence[int], depth: int) -> tuple[int, ...]:
    """Indices of the blocks that hold an MoE layer."""
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


def check_method(method: Any, field: str = 'method') -> None:
    """Refuse a method that there is not."""
    named = isinstance(method, str)
    hint = did_you_mean(method, METHODS) if named else ''
    allowed = f'one of {", ".join(METHODS)}{hint}'
    check(named and method in METHODS, field, method, allowed)


def moe_options(method: str) -> set[str]:
    """Names of the arguments that a model of a method has beyond timm's."""
    return {'moe_layers', *METHODS[method].config.option_names()}


def check_names(names: Iterable[str], method: str) -> None:
    """Refuse an argument that neither timm's vision transformer nor the method has."""
    known, options = inspect.signature(VisionTransformer).parameters, sorted(moe_options(method))
    for name in names:
        if name not in known:
            hint = did_you_mean(name, [*options, *known]) or '.'
            raise TypeError(
                f"{name!r} is neither an argument of timm's VisionTransformer nor an option of "
                f'{method}{hint} Options are {", ".join(options)}'
            )


def check_vit_arguments(kwargs: dict[str, Any]) -> None:
    """Say in one line what timm would assert, ignore, cut off or leave to chance."""
    for name, value in kwargs.items():
        if name in _TYPES and value is not None:
            check_type(name, _TYPES[name], value)
            _check_range(name, value)
    skipped = kwargs.get('weight_init') == 'skip'
    check(not skipped, 'weight_init', 'skip', "'reset', skipping leaves embeddings uninitialised")
    dtype = kwargs.get('dtype')
    real = dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point)
    check(real, 'dtype', dtype, 'a torch.dtype of floating-point numbers')
    _check_device(kwargs.get('device'))
    dim, heads = kwargs.get('embed_dim'), kwargs.get('num_heads')
    if dim is not None and heads is not None:
        check(dim % heads == 0, 'num_heads', heads, f'a divisor of embed_dim={dim}')
    ratio = kwargs.get('mlp_ratio')
    if dim is not None and ratio is not None:
        check(int(dim * ratio) >= 1, 'mlp_ratio', ratio, 'wide enough for one hidden feature')
    for name, layers in _LAYERS.items():
        if isinstance(kwargs.get(name), str):
            _check_layer(name, layers, kwargs)


def _check_device(device: Any) -> None:
    try:
        torch.empty(0, device=device)
    except FAILURES as error:
        raise ValueError(f'device={device!r} is not possible: {error}') from error


def _check_range(name: str, value: Any) -> None:
    if name.endswith('_rate'):
        # a model that drops every patch would have nothing to look at
        below = name == 'patch_drop_rate'
        possible = 0 <= value < 1 if below else 0 <= value <= 1
        check(possible, name, value, 'from 0 to below 1' if below else 'from 0 to 1')
    elif _TYPES[name] is int:
        least = 0 if name in _MAY_BE_ZERO else 1
        check(value >= least, name, value, f'at least {least}')
    elif name in ('img_size', 'patch_size'):
        check(min(to_2tuple(value)) >= 1, name, value, 'at least 1')
    elif name == 'mlp_ratio':
        check(0 < value < math.inf, name, value, 'above 0')
    elif name == 'init_values':
        check(math.isfinite(value), name, value, 'finite, or None')


def _check_layer(name: str, layers: dict[str, Any], kwargs: dict[str, Any]) -> None:
    """Tries the layer of that name in a block, on other sizes of features than of tokens."""
    shape = ('embed_dim', 'num_heads', 'qk_norm', 'scale_attn_norm')
    options = {key: kwargs[key] for key in shape if kwargs.get(key) is not None}

    def fits(layer: str) -> bool:
        with torch.device('meta'), torch.no_grad():
            try:
                model = VisionTransformer(**{**options, name: layer, 'depth': 1})
                tokens = torch.empty(1, model.embed_dim + 1, model.embed_dim)
                return model.blocks(model.patch_embed.norm(tokens)).shape == tokens.shape
            except FAILURES:
                return False

    # '' is timm's default: where not even that fits, the layer is not to blame
    if not fits(kwargs[name]) and fits(''):
        allowed = f'one of {", ".join(map(repr, filter(fits, layers)))}'
        raise ValueError(f'{name}={kwargs[name]!r} is not possible: {allowed}, with {options}')


@contextmanager
def named_failures(
    build: Callable[..., nn.Module], kwargs: dict[str, Any], name: str
) -> Iterator[None]:
    """Say which arguments are to blame when a model cannot be built."""
    try:
        yield
    except FAILURES as error:
        reason = _failure(build, kwargs)
        if reason is None:
            raise  # the arguments are not to blame
        blamed = dict(kwargs)
        for argument in kwargs:
            rest = {key: value for key, value in blamed.items() if key != argument}
            failure = _failure(build, rest)
            if failure is not None:
                blamed, reason = rest, failure
        blamed = blamed or {'model_name': name}
        options = ', '.join(f'{argument}={value!r}' for argument, value in blamed.items())
        kind = TypeError if isinstance(reason, TypeError) else ValueError
        raise kind(f'{options} is not possible: {str(reason) or "timm refuses it"}') from error


def _failure(build: Callable[..., nn.Module], kwargs: dict[str, Any]) -> Exception | None:
    try:
        with torch.device('meta'):
            build(**{**kwargs, 'device': 'meta'})
    except FAILURES as error:
        return error
    return None


def check_experts(kwargs: dict[str, Any]) -> None:
    """Refuse what a dense MLP may be and an expert cannot."""
    for name, possible, allowed in (
        ('scale_mlp_norm', (None, False), 'False, experts have no norm between their layers'),
        ('mlp_layer', (None, Mlp), "timm's Mlp, whose layout experts have"),
    ):
        check(kwargs.get(name) in possible, name, kwargs.get(name), allowed)


def check_patches(model: nn.Module, kwargs: dict[str, Any]) -> None:
    """Refuse a size whose last pixels timm would cut off."""
    embed: Any = getattr(model, 'patch_embed', None)
    size, patch = getattr(embed, 'img_size', None), getattr(embed, 'patch_size', None)
    if size is None or patch is None:
        return
    padded = kwargs.get('dynamic_img_pad') and kwargs.get('dynamic_img_size')
    check_whole_patches(kwargs.get('img_size', size), patch, bool(padded))


def check_whole_patches(img_size: Any, patch_size: Any, padded: bool) -> None:
    """Refuse a size whose last pixels timm would cut off."""
    (height, width), (rows, columns) = to_2tuple(img_size), to_2tuple(patch_size)
    check(
        padded or (height % rows == 0 and width % columns == 0),
        'img_size',
        img_size,
        f'a multiple of patch_size={rows}x{columns}, or any with both '
        'dynamic_img_size=True and dynamic_img_pad=True',
    )
