"""Sparse upcycling: the experts of a layer are made of the dense MLP in their place.

arXiv 2212.05055: every expert is a copy, and the router starts anew. With `EXACT_UPCYCLING` of the
method's options the model then answers as the dense one does. Answers of S shared experts are added
to that of the chosen ones together: each is 1 / (1 + S) of the dense one, by its output layer.

Legend: E experts, S of them shared, D width, H hidden width of an expert, F of the dense MLP, P 2
where a layer has the hidden units twice, those of the gate too, else 1.
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
# Parts of an MLP that have its hidden units, or as many pairs of them, as their first dimension.
_BY_UNIT = ('fc1.', 'fc1_g.', 'fc1_x.', 'norm.')


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
    """Experts made of a dense MLP: fc1.weight (P F, D) to (E, P H, D), fc2.weight to (E, D, H)."""
    _check_fit(mlp, experts, how, name)
    dense = mlp['fc2.weight'].shape[1]
    number, _, hidden = experts.fc2.weight.shape
    units = torch.arange(dense).expand(number, -1)  # (E, H), all of them in order
    if hidden != dense:  # or dealt from shuffled copies
        shuffled = torch.cat([torch.randperm(dense) for _ in range(-(-number * hidden // dense))])
        units = shuffled[: number * hidden].view(number, hidden)
    result: StateDict = {}
    for part in experts.state_dict():
        value = mlp[part]
        if part == 'fc2.weight':
            result[part] = value.t()[units].transpose(1, 2) * (dense / hidden)
        elif part == 'fc2.bias':
            result[part] = value.expand(number, -1).clone()
        elif part.startswith(_BY_UNIT):  # (P F, ...) to (P, E, H, ...)
            dealt = value.unflatten(0, (-1, dense))[:, units]
            result[part] = dealt.transpose(0, 1).flatten(1, 2)
        else:  # all experts have one activation, which may have learned
            result[part] = value.clone()
    if summands > 1:
        result |= {k: v / summands for k, v in result.items() if k.startswith('fc2.')}
    if how.drop > 0:
        for expert in range(number):
            _redraw({k: v[expert] for k, v in result.items() if k.startswith('fc')}, how.drop)
    if how.noise > 0:
        for key, weight in result.items():
            if key.startswith('fc') and key.endswith('.weight'):
                result[key] = weight + how.noise * weight.std() * _normal(weight)
    return result


def _check_fit(mlp: StateDict, experts: Experts, how: Upcycling, name: str) -> None:
    theirs = {part: tuple(value.shape) for part, value in mlp.items()}
    hidden, width, number = experts.fc2.in_features, experts.fc2.out_features, experts.num_experts
    dense = (theirs.get('fc2.weight') or (0,))[-1]
    ours: dict = {'fc2.weight': (width, dense), 'fc2.bias': (width,)}
    for part, value in experts.state_dict().items():
        if part.startswith(_BY_UNIT):
            ours[part] = (value.shape[1] // hidden * dense, *value.shape[2:])
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
    hidden = expert['fc2.weight'].shape[1]
    # the biases of one unit have no spread from which another could be drawn
    chosen = torch.randperm(hidden)[: max(round(share * hidden), 2)]
    # what belongs to a hidden unit: a row of the first layer, its bias, a column of the second; and
    # those of its gate
    for key, part in expert.items():
        if key != 'fc2.bias':
            for rows in (part.t() if key == 'fc2.weight' else part).unflatten(0, (-1, hidden)):
                old = rows[chosen].float()
                rows[chosen] = (old.mean() + old.std(correction=0) * _normal(old)).to(rows.dtype)


def _normal(like: Tensor) -> Tensor:
    return torch.randn(like.shape).to(like)
