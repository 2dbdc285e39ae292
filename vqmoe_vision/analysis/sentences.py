"""What each expert does, in sentences made from the numbers of a survey.

Legend: E experts, C classes.
"""

import torch
from torch import Tensor

from .drawing import listed, percent, spread
from .surveyed import LayerSurvey

# Tokens of an image are no independent draws, so that a test of each class would find everything
# significant: what a reader could see in a picture is said, and nothing below.
STANDS_OUT = 1.25
ENOUGH = 20  # tokens of a class with an expert


def layer_sentence(layer: LayerSurvey) -> str:
    """How the load of a layer spreads."""
    said = []
    for decider, load in layer.load.items():
        dead = int((load == 0).sum())
        word = {0: 'none is dead', 1: '1 took none of these tokens'}.get(
            dead, f'{dead} took none of these tokens'
        )
        said.append(f'By {decider}: {spread(load, "expert")}; {word}.')
    even = f'{100 / layer.num_experts:.3g}\N{NO-BREAK SPACE}%'
    even = f'With {layer.num_experts} experts an even load is {even}.'
    return ' '.join([even, *said])


def expert_sentence(layer: LayerSurvey, expert: int, classes: list[str] | None) -> str:
    """What one expert takes, and which other one it is most like."""
    if all(load[expert] == 0 for load in layer.load.values()):
        return 'takes no token: it is dead.'
    said = []
    for decider, load in layer.load.items():
        share = percent(load[expert].item()) if load[expert] > 0 else 'none'
        taken = f'takes {share} of the tokens by {decider}'
        if decider == 'slots':
            taken = f'gives {share} of the answers, by its slots'
        counts = layer.expert_by_class.get(decider)
        if counts is None or classes is None or load[expert] == 0:
            said.append(f'{taken}.')
        else:
            said.append(f'{taken}; {_classes(counts, expert, classes)}.')
    cosine = layer.similarity.get('outputs')
    if cosine is not None and len(cosine) > 1:
        others = cosine[expert].double().clone()
        others[expert] = -torch.inf
        nearest = int(others.argmax())
        said.append(
            f'Of the other experts, expert {nearest} answers most like it '
            f'(cosine {others[nearest].item():.2f}).'
        )
    return ' '.join([said[0], *(f'It {s}' if s.startswith('takes') else s for s in said[1:])])


def over_represented(counts: Tensor, expert: int) -> list[tuple[int, float]]:
    """Classes that an expert takes clearly more often than all tokens have them, most so first."""
    counts = counts.double()
    of_expert = counts[expert] / counts[expert].sum().clamp(min=1)
    of_all = counts.sum(0) / counts.sum().clamp(min=1)
    lift = of_expert / of_all.clamp(min=1e-12)
    lift[counts[expert] < ENOUGH] = 0
    order = lift.argsort(descending=True, stable=True).tolist()
    return [(i, lift[i].item()) for i in order if lift[i] >= STANDS_OUT]


def _classes(counts: Tensor, expert: int, classes: list[str]) -> str:
    found = over_represented(counts, expert)
    if not found:
        return 'no class stands out'
    named = [f'{classes[i]} ({lift:.2f} times its share)' for i, lift in found[:3]]
    more = f', and {len(found) - 3} more' if len(found) > 3 else ''
    kinds = 'the class' if len(found) == 1 else 'the classes'
    return f'over-represented: {kinds} {listed(named)}{more}'
