"""Sparse upcycling: the experts of a layer are made of the dense MLP in their place.

arXiv 2212.05055: every expert is a copy, and the router starts anew. With `EXACT_UPCYCLING` of the
method's options the model then answers as the dense one does. Answers of S shared experts are added
to that of the chosen ones together: each is 1 / (1 + S) of the dense one, by its output layer.

Legend: E experts, S of them shared, D width, H hidden width of an expert, F of the dense MLP.
"""

import math
from dataclasses import dataclass, fields
from typing import get_type_hints

import torch
from torch import Tensor

from ..moe.config import check, check_type
from ..moe.experts import Experts

StateDict = dict[str, Tensor]

# Arguments of a model that say what its weights began as; no model is built again with them.
BEGINNING = ('upcycle', 'upcycling')
_PARTS = ('fc1.weight', 'fc1.bias', 'fc2.weight', 'fc2.bias')


@dataclass(frozen=True, kw_only=True)
class Upcycling:
    """How experts differ from the dense MLP that they are made of; by default not at all.

    Args:
        noise: Gaussian, over the standard deviation of each matrix (cf. arXiv 2212.05055).
        drop: Share of hidden units drawn anew per expert (Drop-Upcycling, arXiv 2502.19261: 0.5).
        split: Hidden units are shuffled and dealt to narrower experts (Qwen2, arXiv 2407.10671).

    Raises:
        ValueError: If a value is impossible.
    """

    noise: float = 0.0
    drop: float = 0.0
    split: bool = False

    def __post_init__(self) -> None:
        types = get_type_hints(type(self))
        for field in fields(self):
            check_type(f'upcycling.{field.name}', types[field.name], getattr(self, field.name))
        check(0 <= self.noise <= 100, 'upcycling.noise', self.noise, 'from 0 to 100')
        check(0 <= self.drop <= 1, 'upcycling.drop', self.drop, 'from 0 to 1')


def read_upcycling(value: Upcycling | dict | None) -> Upcycling:
    """The options that a user gave, in any form."""
    if isinstance(value, Upcycling):
        return value
    check(isinstance(value, dict | None), 'upcycling', value, 'a dictionary of options, or None')
    return Upcycling(**(value or {}))


def refuse_unused(how: Upcycling, ways: str) -> None:
    """Refuse options of experts that are made of a dense MLP where none are."""
    check(how == Upcycling(), 'upcycling', how, f'None, no dense weights are loaded: use {ways}')


def upcycle(
    mlp: StateDict, experts: Experts, how: Upcycling, name: str, summands: int = 1
) -> StateDict:
    """Experts made of a dense MLP: fc1.weight (F, D) becomes (E, H, D), fc2.weight (E, D, H)."""
    _check_fit(mlp, experts, how, name)
    dense = mlp['fc1.weight'].shape[0]
    number, hidden, _ = experts.fc1.weight.shape
    units = torch.arange(dense).expand(number, -1)  # (E, H), all of them in order
    if hidden != dense:  # or dealt from shuffled copies
        shuffled = torch.cat([torch.randperm(dense) for _ in range(-(-number * hidden // dense))])
        units = shuffled[: number * hidden].view(number, hidden)
    result = {
        'fc1.weight': mlp['fc1.weight'][units],
        'fc2.weight': mlp['fc2.weight'].t()[units].transpose(1, 2) * (dense / hidden),
    }
    if 'fc1.bias' in mlp:
        result['fc1.bias'] = mlp['fc1.bias'][units]
        result['fc2.bias'] = mlp['fc2.bias'].expand(number, -1).clone()
    if summands > 1:
        result |= {k: v / summands for k, v in result.items() if k.startswith('fc2.')}
    if how.drop > 0:
        for expert in range(number):
            _redraw({key: value[expert] for key, value in result.items()}, how.drop)
    if how.noise > 0:
        for key in ('fc1.weight', 'fc2.weight'):
            weight = result[key]
            result[key] = weight + how.noise * weight.std() * _normal(weight)
    # all experts have one activation, which may have learned
    return result | {part: value.clone() for part, value in mlp.items() if part not in _PARTS}


def _check_fit(mlp: StateDict, experts: Experts, how: Upcycling, name: str) -> None:
    theirs = {part: tuple(value.shape) for part, value in mlp.items()}
    width, hidden, number = experts.fc1.in_features, experts.fc1.out_features, experts.num_experts
    dense = (theirs.get('fc1.weight') or (0,))[0]
    ours = dict(zip(_PARTS, ((dense, width), (dense,), (width, dense), (width,)), strict=True))
    # what an activation learns is one number, and all experts have it
    other = [k for k in theirs if (theirs[k] != ours[k] if k in ours else mlp[k].numel() != 1)]
    if mlp.keys() != experts.state_dict().keys() or other:
        raise ValueError(
            f'{name} is no MLP of {width} channels that experts can be made of: it has {theirs}, '
            f'and experts are of {", ".join(experts.state_dict())}'
        )
    if how.split:
        allowed = (
            f'False, {number} experts of {hidden} do not share out the {dense} units of {name}'
        )
        check(hidden < dense <= number * hidden, 'upcycling.split', True, allowed)
    elif hidden != dense:
        ratio = dense / width
        # timm rounds the product down: the next number above the quotient is always enough
        fits = ratio if int(width * ratio) == dense else math.nextafter(ratio, math.inf)
        cut = ', or upcycling.split=True cuts it into narrower experts' if hidden < dense else ''
        raise ValueError(
            f'{name} has {dense} hidden units and experts {hidden}: '
            f'expert_mlp_ratio={fits} fits{cut}'
        )


def _redraw(expert: StateDict, share: float) -> None:
    hidden = expert['fc1.weight'].shape[0]
    # the biases of one unit have no spread from which another could be drawn
    chosen = torch.randperm(hidden)[: max(round(share * hidden), 2)]
    # what belongs to a hidden unit: a row of the first layer, its bias, a column of the second
    for part in (expert['fc1.weight'], expert.get('fc1.bias'), expert['fc2.weight'].t()):
        if part is not None:
            old = part[chosen].float()
            part[chosen] = (old.mean() + old.std(correction=0) * _normal(old)).to(part.dtype)


def _normal(like: Tensor) -> Tensor:
    return torch.randn(like.shape).to(like)
