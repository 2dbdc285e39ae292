"""Surveys made by hand: what a model would show, without a model."""

import math

import torch
from torch import Tensor

from vqmoe_vision.analysis.survey import Example, Survey
from vqmoe_vision.analysis.tally import Codes, LayerSurvey, Patch

EXPERTS, ROWS = 4, 6
CLASSES = ['cat', 'dog', 'tree']
CODES = 8
NAME = 'blocks.1.mlp'
ROUTER, CODEBOOK = 'router', 'quantizer.codebook'


def blobs(height: int, width: int) -> Tensor:
    """A picture (3, height, width) of smooth colours."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing='ij')
    return torch.stack([x, y, (torch.sin(9 * x) * torch.cos(7 * y) + 1) / 2])


def example(name: str, layers: list[str], size: tuple[int, int] = (48, 48)) -> Example:
    picture = blobs(*size)
    y, x = torch.meshgrid(torch.arange(ROWS), torch.arange(ROWS), indexing='ij')
    return Example(
        name,
        picture,
        {layer: {ROUTER: (x + at) % EXPERTS, CODEBOOK: (x + at) % EXPERTS,
                 f'{CODEBOOK}: codes': (x + y) % CODES,
                 'continuous share': torch.sigmoid((x - y).float())}
         for at, layer in enumerate(layers)},
    )  # fmt: skip


def layer_survey() -> LayerSurvey:
    """A layer with a router and a codebook, whose last expert is dead."""
    patches = [
        [Patch(blobs(8, 8) * (at + 1) / EXPERTS, 0.9 - 0.1 * i, 10 * at + i) for i in range(5)]
        for at in range(EXPERTS - 1)
    ]
    # of the 300 tokens of expert 0 two thirds are of cats, of all 600 tokens one third
    counts = torch.tensor([[200, 50, 50], [0, 100, 80], [0, 50, 70], [0, 0, 0]])
    similarity = torch.eye(EXPERTS).double()
    similarity[0, 1] = similarity[1, 0] = 0.75
    codes = torch.randn(CODES, 12, generator=torch.Generator().manual_seed(0))
    indices = torch.arange(200) % (CODES - 1)  # the last code is dead
    noise = torch.randn(200, 12, generator=torch.Generator().manual_seed(1))
    return LayerSurvey(
        EXPERTS,
        {'router/load_entropy': 0.74, 'effective_rank_before': 9.5, 'router/dead_experts': 1.0},
        {ROUTER: torch.tensor([0.5, 0.3, 0.2, 0.0]), CODEBOOK: torch.full((EXPERTS,), 0.25)},
        {ROUTER: counts},
        {'weights': similarity, 'outputs': similarity},
        {ROUTER: [*patches, []]},
        Codes(codes, indices.bincount(minlength=CODES) / 200, codes[indices] + noise / 3, indices),
    )


def survey(title: str = 'vit_tiny_vqmoe', layers: int = 2) -> Survey:
    names = [f'blocks.{2 * i + 1}.mlp' for i in range(layers)]
    shift = {f'{name}.{ROUTER}': 0.125 for name in names}
    shifts = {'gaussian_noise 3': shift, 'flip': shift}
    examples = [example('0.png', names), example('1.png', names, (48, 96))]
    surveyed = {name: layer_survey() for name in names}
    return Survey(title, 1234, CLASSES, surveyed, examples, shifts)


def soft_survey(title: str = 'vit_tiny_softmoe') -> Survey:
    """What a SoftMoE would show: slots, and nothing that decides."""
    slots = torch.rand(EXPERTS, ROWS, ROWS, generator=torch.Generator().manual_seed(0))
    load, same = {'slots': torch.tensor([0.4, 0.3, 0.2, 0.1])}, torch.eye(EXPERTS)
    similar = {'weights': same, 'outputs': same}
    layer = LayerSurvey(EXPERTS, {'effective_rank_before': 7.25}, load, {}, similar, {}, None)
    maps = {'slots': slots.argmax(0), **{f'expert {e}': s for e, s in enumerate(slots)}}
    seen = Example('0.png', blobs(48, 48), {NAME: maps})
    return Survey(title, 1, None, {NAME: layer}, [seen], {})


def history(records: int = 12) -> list[dict]:
    lines = []
    for at in range(1, records + 1):
        load = torch.softmax(torch.arange(EXPERTS) * math.exp(-at / 4), 0)
        change = {'router': 0.1 / at, 'experts': 0.2, 'codebook': 0.3 / at**2, 'frozen': 0.0}
        layer = {'load': load.tolist(), 'code_usage': [1 / CODES] * CODES, 'change': change}
        lines.append({'iteration': 10 * at, 'layers': {NAME: layer, 'blocks.3.mlp': layer}})
    return lines
