"""Tensors of mmsegmentation's vision transformer, in the names of timm."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from .state_dicts import StateDict

# mmseg's `VisionTransformer` has other names for the same parts.
_FROM_MMSEG = (
    (r'^patch_embed\.projection\.', 'patch_embed.proj.'),
    (r'^layers\.', 'blocks.'),
    (r'^ln1\.', 'norm.'),
    (r'\.ln([12])\.', r'.norm\1.'),
    (r'\.attn\.attn\.in_proj_', '.attn.qkv.'),
    (r'\.attn\.attn\.out_proj\.', '.attn.proj.'),
    (r'\.ffn\.layers\.0\.0\.', '.mlp.fc1.'),
    (r'\.ffn\.layers\.1\.', '.mlp.fc2.'),
)


def is_of_mmseg(state: StateDict) -> bool:
    """Whether tensors have the names of mmseg's `VisionTransformer`."""
    return any(name.startswith('layers.0.') for name in state)


def from_mmseg(state: StateDict) -> StateDict:
    """The same tensors in timm's names; a stem without a bias gets one of zeros."""
    renamed = {replaced(name, _FROM_MMSEG): value for name, value in state.items()}
    if 'patch_embed.proj.weight' in renamed:  # mmseg's has no bias since 1.2
        stem = renamed['patch_embed.proj.weight']
        renamed.setdefault('patch_embed.proj.bias', torch.zeros_like(stem[:, 0, 0, 0]))
    return renamed


def replaced(name: str, replacements: Sequence[tuple[str, str]]) -> str:
    """A name after all replacements."""
    for theirs, ours in replacements:
        name = re.sub(theirs, ours, name)
    return name
