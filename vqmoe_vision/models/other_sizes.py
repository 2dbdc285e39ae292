"""Checkpoints whose tensors have other shapes than the model's: which size would fit."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from torch import nn

from .options_that_fit import experts_that_fit, mlp_ratio_of
from .other_experts import block_of
from .state_dicts import StateDict

_STEM = 'patch_embed.proj.weight'
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Model:
    """What the names and shapes of a model do not tell.

    Args:
        network: The model.
        heads: Attention heads; 0 if that is not known.
        same_heads: Whether the checkpoint is known to have as many.
        whole: Whether it is more than a backbone, which may have fewer blocks than a checkpoint.
        options: Of the experts of the checkpoint that the model has otherwise; empty if that is not
            known, or if the method is another.
    """

    network: nn.Module
    heads: int
    same_heads: bool
    whole: bool
    options: str = ''


def sizes_that_fit(expected: StateDict, fitted: StateDict, model: Model) -> str:
    """The one argument by which a model would have the sizes of a checkpoint, and its depth.

    Args:
        expected: Of the model.
        fitted: Of the checkpoint, by the names of the model.
        model: That has them.

    Returns:
        Empty if there is none that explains all sizes that differ.
    """
    pairs = {
        k: (tuple(fitted[k].shape), tuple(v.shape)) for k, v in expected.items() if k in fitted
    }
    other = {name: shapes for name, shapes in pairs.items() if shapes[0] != shapes[1]}
    if any(len(a) != len(b) for a, b in other.values()):
        return ''
    width = _width(other, pairs, model)
    if experts := _experts(other, fitted, model):
        return experts
    hint = _channels(other) or width or _hidden(other)
    if not hint:
        return ''
    theirs, ours = ({block_of(name) for name in names} - {''} for names in (fitted, expected))
    depth = f', depth={len(theirs)}' if ours - theirs or (model.whole and theirs - ours) else ''
    heads = _heads(other, model) if hint == width else ''
    return f'; {hint}{depth}{heads} would fit'


def _experts(other: dict[str, tuple[Shape, Shape]], fitted: StateDict, model: Model) -> str:
    """Of experts, if nothing else differs."""
    alone = all('.mlp.' in name and '.mlp.fc' not in name for name in other)
    if not alone:
        return ''
    found = experts_that_fit(model.network, fitted)
    # the names are those of the method, which other methods may share
    return str(replace(found, methods='') if found.options else found)


def _channels(other: dict[str, tuple[Shape, Shape]]) -> str:
    """Of how many channels images are, if nothing else differs."""
    if other.keys() != {_STEM}:
        return ''
    ((theirs, ours),) = other.values()
    alone = (theirs[0], *theirs[2:]) == (ours[0], *ours[2:])
    return f'in_chans={theirs[1]}' if alone else ''


def _width(
    other: dict[str, tuple[Shape, Shape]], pairs: dict[str, tuple[Shape, Shape]], model: Model
) -> str:
    """The width of tokens, if every size that differs is as many times that in both."""
    if _STEM not in other:
        return ''
    (theirs, *_), (ours, *_) = other[_STEM]

    def scales(a: int, b: int) -> bool:
        return a * ours == b * theirs

    alone = all(
        m == n or scales(m, n) for a, b in other.values() for m, n in zip(a, b, strict=True)
    )
    # hidden features of an MLP follow the width
    hidden = [
        shapes for name, shapes in pairs.items() if re.search(r'\.fc1(\.\d+)?\.weight$', name)
    ]
    follow = all(scales(a[-2], b[-2]) for a, b in hidden)
    heads = model.heads if model.same_heads else _likely_heads(theirs, ours, model)
    possible = heads > 0 and theirs % heads == 0
    return f'embed_dim={theirs}' if alone and follow and possible else ''


def _heads(other: dict[str, tuple[Shape, Shape]], model: Model) -> str:
    """What is to say of heads beside another width: names and shapes do not tell their number."""
    if model.same_heads:
        return ''
    (theirs, *_), (ours, *_) = other[_STEM]
    number = _likely_heads(theirs, ours, model)
    return f' and the num_heads of the checkpoint, probably {number},'


def _likely_heads(theirs: int, ours: int, model: Model) -> int:
    """As many as heads of the width of the model's make; 0 if they make no whole number."""
    heads, rest = divmod(model.heads * theirs, ours)
    return 0 if rest else heads


def _hidden(other: dict[str, tuple[Shape, Shape]]) -> str:
    """How many hidden features an MLP has for each feature, if nothing else differs."""
    hidden = {
        a[-2:] for name, (a, _) in other.items() if re.search(r'\.fc1(\.\d+)?\.weight$', name)
    }
    if len(hidden) != 1 or not all(re.search(r'\.fc[12]\.', name) for name in other):
        return ''
    ((features, width),) = hidden
    ratio = mlp_ratio_of(features, width)
    return '' if ratio is None else f'mlp_ratio={ratio}'
