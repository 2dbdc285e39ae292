"""Checkpoints whose tensors have other shapes than the model's: which size would fit."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .other_experts import block_of
from .state_dicts import StateDict

_STEM = 'patch_embed.proj.weight'
_CLUSTERS = '.cluster_embed'
# Parts with a row for each of what an option counts.
_NUMBERS = {_CLUSTERS: 'num_clusters', '.quantizer.codebook.': 'num_codes'}
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Model:
    """What the names and shapes of a model do not tell.

    Args:
        heads: Attention heads; 0 if that is not known.
        same_heads: Whether the checkpoint is known to have as many.
        whole: Whether it is more than a backbone, which may have fewer blocks than a checkpoint.
        options: Of the experts of the checkpoint that the model has otherwise; empty if that is not
            known, or if the method is another.
    """

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
    hint = (
        _number_of_experts(other, pairs)
        or _rows(other)
        or _channels(other)
        or width
        or _hidden(other)
    )
    if not hint:
        return ''
    theirs, ours = ({block_of(name) for name in names} - {''} for names in (fitted, expected))
    depth = f', depth={len(theirs)}' if ours - theirs or (model.whole and theirs - ours) else ''
    heads = _heads(other, model) if hint == width else ''
    return f'; {hint}{depth}{heads} would fit'


def _number_of_experts(
    other: dict[str, tuple[Shape, Shape]], pairs: dict[str, tuple[Shape, Shape]]
) -> str:
    numbers = {(a[0], b[0]) for name, (a, b) in pairs.items() if '.mlp.experts.' in name}
    if len(numbers) != 1:
        return ''
    ((theirs, ours),) = numbers

    def follows(name: str, a: int, b: int) -> bool:
        # MoCLE's router does not choose the universal expert
        chosen = '.router.' in name and (a, b) == (theirs - 1, ours - 1)
        return (a, b) == (theirs, ours) or chosen

    alone = all(
        a[1:] == b[1:] and not name.endswith(_CLUSTERS) and follows(name, a[0], b[0])
        for name, (a, b) in other.items()
    )
    return f'num_experts={theirs}' if alone else ''


def _rows(other: dict[str, tuple[Shape, Shape]]) -> str:
    """How many clusters or codes there are, if nothing else differs."""
    numbers = {a[0] for a, b in other.values() if len(a) and a[1:] == b[1:]}
    for part, option in _NUMBERS.items():
        if len(numbers) == 1 and all(part in name for name in other):
            return f'{option}={numbers.pop()}'
    return ''


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
    ratio = features / width
    # timm rounds the product down
    short = next((r for r in (round(ratio, 4), ratio) if int(width * r) == features), None)
    return '' if short is None else f'mlp_ratio={short}'
