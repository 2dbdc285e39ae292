"""Checkpoints that are of another network than the model, each refused in one line.

All functions take state dicts in timm's names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from .fitting import in_names_of
from .networks_that_fit import Model, network_that_fits
from .other_experts import refuse_other_experts
from .other_sizes import sizes_that_fit
from .state_dicts import HEADS, StateDict, block_of, layer_of, other_shapes, shorten
from .would_fit import NORMS, VIT

# What timm's `Eva` and files of DINOv3's authors have, whose positions are rotary.
_ROTARY = r'^rope|^storage_tokens$|\.gamma_1$|\.q_bias$'
# What gated MLPs have, in timm and in files of others.
_GATED = r'^blocks\.\d+\.mlp\.(fc1_g|w12|w1)\.weight$'
# The network of convolutions before the patches of a hybrid.
_HYBRID = 'patch_embed.backbone.'
# What the files of Perception Encoders have together, which are an `Eva` with rotary positions
# beside absolute ones, and no `VisionTransformer` of timm's has by its name.
_OF_PE = {'norm_pre.weight', 'attn_pool.latent'}
# What networks have that are neither: BEiT, ViTs with relative positions, SAM's, and NaFlexVit.
_OTHERS = r'relative_position_bias_table|(^|[._])rel_pos|^embeds\.'


def refuse_other_tokens(state: StateDict, expected: StateDict, path: str, model: Model) -> None:
    """Refuse a token of its own or a position embedding that only one of both has."""
    if others := [name for name in state if re.search(_OTHERS, name)]:
        raise ValueError(
            f'checkpoint {path!r} does not fit the model: it has {shorten(others, 1)}, and is of '
            "another network than timm's VisionTransformer and Eva, which no option makes of them"
        )
    stem = [name for name in state if name.startswith(_HYBRID)]
    if stem and not any(name.startswith(_HYBRID) for name in expected):
        raise ValueError(
            f'checkpoint {path!r} does not fit the model: it has {shorten(stem, 1)}, as hybrids '
            'whose patches come from a network of convolutions, which no option makes; the '
            "model_name of that hybrid with moe=dict(method='smoe'), or convert_to_moe, makes a "
            'model that fits'
        )
    rotary = 'pos_embed' not in state and any(re.search(_ROTARY, name) for name in state)
    if rotary and model.arguments is VIT:
        raise ValueError(
            f'checkpoint {path!r} does not fit the model: it has the names of an Eva, such as '
            'DINOv3, whose positions are rotary; the model_name of an Eva with '
            "moe=dict(method='smoe'), or convert_to_moe, makes a model that fits"
        )
    # timm's name for DINOv2's and DINOv3's
    registers = ('register_tokens', 'storage_tokens')
    state = {'reg_token' if k in registers else k: v for k, v in state.items()}
    if 'dist_token' in state and 'dist_token' not in expected:
        raise ValueError(
            f'checkpoint {path!r} does not fit the model: only the checkpoint has dist_token; a '
            'distilled DeiT, deit_*_distilled_*, would fit, which is dense and takes no experts'
        )
    for name in ('cls_token', 'pos_embed', 'reg_token', 'dist_token'):
        if (name in state) != (name in expected):
            owner = 'checkpoint' if name in state else 'model'
            raise ValueError(_only_one_has(path, [name], owner, _network(state, model, path)))


def _only_one_has(path: str, names: Sequence[str], owner: str, fits: str) -> str:
    return (
        f'checkpoint {path!r} does not fit the model: only the {owner} has {shorten(names)}{fits}'
    )


def _network(state: StateDict, model: Model, path: str) -> str:
    """What would fit a checkpoint that timm's filter has not seen, for the end of a line."""
    network: Any = model.network
    given = state.get('pos_embed')
    own = {} if given is None or network.pos_embed is None else {'pos_embed': network.pos_embed}
    try:  # without the positions, which the filter could not resize
        named = in_names_of(network, {**state, **own}, path)
    except ValueError:
        return ''
    return str(network_that_fits(model, named, None if given is None else given.shape[1]))


def perhaps_rotary(
    state: StateDict, expected: StateDict, path: str, model: Model
) -> tuple[str, ...]:
    """Of a bare file: refuse what would be led into a network without its rotary positions."""
    if model.arguments is not VIT or not state.keys() >= _OF_PE:
        return ()
    sign = (
        'norm_pre and attn_pool, as an Eva such as Perception Encoder, whose positions are rotary'
    )
    if 'norm_pre.weight' in expected:
        return (f'it has {sign} too; names do not tell it from a VisionTransformer',)
    raise ValueError(
        f'checkpoint {path!r} does not fit the model: it has {sign} too; the model_name of that '
        "Eva with moe=dict(method='smoe'), or convert_to_moe, makes a model that fits; if it is of "
        'a VisionTransformer, pre_norm=True would fit'
    )


def refuse_values(expected: StateDict, state: StateDict, path: str) -> None:
    """Refuse weights that are no numbers, or whole numbers where the model has real ones."""
    layers = {layer_of(name) for name in expected} - {''}  # whose dense MLPs experts are made of
    for name, value in state.items():
        if name not in expected and layer_of(name) not in layers:
            continue
        real = name not in expected or expected[name].is_floating_point()
        if value.is_floating_point() != real:
            kind = 'real' if real else 'whole'
            raise ValueError(
                f'checkpoint {path!r} does not fit the model: {name} is of {value.dtype}, the '
                f'model has {kind} numbers there'
            )
        if real and not torch.isfinite(value.float()).all():
            raise ValueError(f'checkpoint {path!r} is damaged: {name} has values nan or infinite')


def refuse_gated(expected: StateDict, state: StateDict, path: str) -> None:
    """Refuse gated MLPs (SwiGLU), also by the names of a plain one, with twice the features."""
    gated = _first_gated(state)
    if not gated or _first_gated(expected):
        return
    layer, sign = gated
    experts = any('.mlp.experts.' in name for name in expected)
    plain = 'experts are plain MLPs' if experts else 'the model has plain MLPs'
    raise ValueError(
        f'checkpoint {path!r} does not fit the model: {layer} is a gated MLP (SwiGLU), {sign}; '
        f'{plain}'
    )


def _first_gated(state: StateDict) -> tuple[str, str] | None:
    """The first gated MLP and its sign; None without one."""
    for name, weight in state.items():
        layer = layer_of(name)
        if re.search(_GATED, name):
            return layer, f'it has {name.removeprefix(layer + ".")}'
        second = state.get(f'{layer}.fc2.weight')
        if name != f'{layer}.fc1.weight' or second is None or not weight.ndim == second.ndim == 2:
            continue  # no MLP at all
        given, taken = weight.shape[0], second.shape[1]
        if given != taken:
            return layer, f'fc1 gives {given} features and fc2 takes {taken}'
    return None


def refuse_misfits(
    expected: StateDict, filtered: StateDict, fitted: StateDict, path: str, model: Model
) -> None:
    """Refuse a checkpoint of another size or with other experts."""
    # first, for sizes that fit would not do for another method
    refuse_other_experts(expected, filtered, fitted, path, model.network, model.options)
    shapes = other_shapes(expected, fitted)
    if shapes:
        hint = sizes_that_fit(expected, fitted, model)
        raise ValueError(f'checkpoint {path!r} is of another size: {shorten(shapes)}{hint}')


def refuse_other_parts(expected: StateDict, fitted: StateDict, path: str, model: Model) -> None:
    """Refuse tensors of the network that only one of both has: it would be another function."""
    layers = {layer_of(name) for name in expected if '.mlp.experts.' in name}
    blocks = {block_of(name) for name in expected}

    def matters(name: str) -> bool:
        free = name.startswith((*HEADS, *NORMS)) or layer_of(name) in layers
        return not free and (model.whole or block_of(name) in blocks)

    for owner, part, other in (('checkpoint', fitted, expected), ('model', expected, fitted)):
        names = [name for name in part if name not in other and matters(name)]
        if names:
            fits = str(network_that_fits(model, fitted))
            raise ValueError(_only_one_has(path, names, owner, fits))
