"""Checkpoints of another function than the model's, each refused in one line.

All functions take state dicts in timm's names.
"""

from __future__ import annotations

import re

import torch
from timm.models.eva import Eva

from .hosts import Transformer
from .state_dicts import HEADS, NORMS, StateDict, block_of, layer_of, misfit

# What timm's `Eva` and files of DINOv3's authors have; BEiTs have some of it.
_ROTARY = r'^rope|^storage_tokens$|\.gamma_1$|\.q_bias$'
# What gated MLPs have, in timm and in files of others.
_GATED = r'^blocks\.\d+\.mlp\.(fc1_g|w12|w1)\.weight$'
# What the files of Perception Encoders have together, which are an `Eva` with rotary positions
# beside absolute ones, and no `VisionTransformer` of timm's has by its name.
_OF_PE = {'norm_pre.weight', 'attn_pool.latent'}
_TOKENS = ('cls_token', 'pos_embed', 'reg_token', 'dist_token')
# timm's name for DINOv2's and DINOv3's
_REGISTERS = ('register_tokens', 'storage_tokens')


def refuse_other_tokens(
    state: StateDict, expected: StateDict, path: str, model: Transformer
) -> None:
    """Refuse what timm's filter would rename or resize until it fits."""
    rotary = 'pos_embed' not in state and any(re.search(_ROTARY, name) for name in state)
    if rotary and not isinstance(model, Eva):
        raise ValueError(
            f'checkpoint {path!r} does not fit the model: it has the names of an Eva or BEiT, '
            'whose positions are rotary or relative'
        )
    theirs = {'reg_token' if name in _REGISTERS else name for name in state}
    for name in _TOKENS:
        if (name in theirs) != (name in expected):
            owner = 'checkpoint' if name in theirs else 'model'
            raise ValueError(
                f'checkpoint {path!r} does not fit the model: only the {owner} has {name}'
            )


def perhaps_rotary(state: StateDict, model: Transformer) -> tuple[str, ...]:
    """A warning of a bare file that may be of a network with rotary positions."""
    if isinstance(model, Eva) or not state.keys() >= _OF_PE:
        return ()
    return (
        'it has norm_pre and attn_pool, as an Eva such as Perception Encoder, whose positions are '
        'rotary too; names do not tell it from a VisionTransformer',
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
    layer = _first_gated(state)
    if layer and not _first_gated(expected):
        raise ValueError(
            f'checkpoint {path!r} does not fit the model: {layer} is a gated MLP (SwiGLU), the '
            'model has plain MLPs'
        )


def _first_gated(state: StateDict) -> str:
    for name, weight in state.items():
        layer = layer_of(name)
        second = state.get(f'{layer}.fc2.weight')
        if re.search(_GATED, name):
            return layer
        if name != f'{layer}.fc1.weight' or second is None or not weight.ndim == second.ndim == 2:
            continue  # no MLP at all
        if weight.shape[0] != second.shape[1]:
            return layer
    return ''


def refuse_misfits(
    expected: StateDict, fitted: StateDict, path: str, whole: bool, saved_with: str
) -> None:
    """Refuse tensors that only one of both has, or in other shapes: it would be another function.

    A backbone (not `whole`) may end before its checkpoint. Free are heads, last norms, and MoE
    layers for which the checkpoint has no experts.
    """
    ours, theirs = (
        {layer_of(name) for name in part if '.mlp.experts.' in name} for part in (expected, fitted)
    )
    free = ours - theirs
    blocks = {block_of(name) for name in expected}

    def matters(name: str) -> bool:
        if name.startswith((*HEADS, *NORMS)) or layer_of(name) in free:
            return name in expected and name in fitted
        return whole or block_of(name) in blocks

    parts = ({k: v for k, v in part.items() if matters(k)} for part in (expected, fitted))
    if problem := misfit(*parts):
        raise ValueError(f'checkpoint {path!r} does not fit the model: {problem}{saved_with}')
