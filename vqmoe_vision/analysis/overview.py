"""The first screen of a report: a line per layer, photographs in the colours of experts, the load.

Needs pillow, which comes with matplotlib (extra `train`).
"""

import base64
import io
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from . import verdicts
from .pictures import expert_colours, short, tint_patches
from .survey import Example, Survey
from .tally import LayerSurvey

PHOTOS, SHOWN, PIXELS = 4, 3, 240  # photographs, layers below them, and the most of a side
PARTS = ('image', 'position', 'noise')


class Line(NamedTuple):
    """What is said of a layer, and by decider the shares of bits of `PARTS`, in percent."""

    layer: str
    healthy: bool
    said: list[str]
    bars: dict[str, list[tuple[str, float, float]]]  # part, bits, percent


class Load(NamedTuple):
    """A bar: expert, share in percent, and the colours of its ground and its letters."""

    name: str
    parts: list[tuple[int, float, str, str]]


class Strip(NamedTuple):
    """A row of pictures below its name; each has an address and a text."""

    name: str
    pictures: list[tuple[str, str]]


class Overview(NamedTuple):
    """Of one model."""

    title: str
    seen: str
    lines: list[Line]
    strips: list[Strip]
    loads: list[Load]


def overview(survey: Survey) -> Overview:
    """All that the first screen shows of a model; layers that are not healthy come first below."""
    lines = [_line(name, layer) for name, layer in survey.layers.items()]
    worst = sorted(lines, key=lambda line: line.healthy)[:SHOWN]
    shown = [line.layer for line in lines if line in worst]
    of = f' of {len(survey.classes)} classes' if survey.classes else ''
    seen = f'{survey.images:,} image{"" if survey.images == 1 else "s"}{of}'
    return Overview(survey.title, seen, lines, _strips(survey, shown), [*_loads(survey)])


def _line(name: str, layer: LayerSurvey) -> Line:
    words, bars = verdicts.named(layer.numbers), {}
    said = [
        f'{short(decider)}: {_said(decider, own, layer)}' if len(words) > 1 else _said(*each, layer)
        for each in words.items()
        for decider, own in [each]
        if own
    ]
    told = [v for n, v in layer.numbers.items() if n.endswith('/image_bits')]
    if not said:
        bits = f'{" and ".join(f"{v:.2f}" for v in told)} bits between expert and image'
        said = [f'{verdicts.HEALTHY}: {bits if told else "nothing is dead"}']
    for decider in words:
        of = _numbers(decider, layer.numbers)
        if 'image_bits' in of and layer.num_experts > 1:
            most = math.log2(layer.num_experts)
            bits = [(part, of[f'{part}_bits']) for part in PARTS]
            bits.append(('unused', max(most - sum(b for _, b in bits), 0.0)))
            bars[short(decider)] = [(part, b, 100 * b / most) for part, b in bits]
    return Line(short(name), not any(words.values()), said, bars)


def _numbers(decider: str, numbers: Mapping[str, float]) -> dict[str, float]:
    own = f'{decider}/'
    return {n.removeprefix(own): v for n, v in numbers.items() if n.startswith(own)}


def _said(decider: str, words: list[str], layer: LayerSurvey) -> str:
    of, said = _numbers(decider, layer.numbers), []
    for word in words:
        if word == verdicts.COLLAPSED:
            text = (
                f'{of["load_bits"]:.2f} of {of["load_bits"] + of["unused_bits"]:.2f} bits are left'
            )
        elif word == verdicts.IGNORES:
            text = f'{of["image_bits"]:.2f} bits between expert and image'
        elif word == verdicts.BY_POSITION:
            text = f'{of["position_bits"]:.2f} bits, the image {of["image_bits"]:.2f}'
        elif word == verdicts.DEAD_EXPERTS:
            text = f'{of["dead_experts"]:.0f} of {layer.num_experts}'
        else:
            text = f'{of["dead_codes"]:.0f}, {of["code_perplexity"]:.1f} in use'
        said.append(f'{word}: {text}')
    return '; '.join(said)


def _strips(survey: Survey, layers: list[str]) -> Iterator[Strip] | list[Strip]:
    examples = survey.examples[:PHOTOS]
    if not examples:
        return []
    found = [Strip('', [(_uri(e.image), e.name) for e in examples])]
    for name, layer in survey.layers.items():
        if short(name) not in layers:
            continue
        maps = [_map(example, name) for example in examples]
        pictures = []
        for example, (kind, chosen) in zip(examples, maps, strict=True):
            if chosen is None:
                break
            number = int(max(chosen.max().item() + 1, layer.num_experts))
            tinted = tint_patches(example.image[None], chosen[None], number)[0]
            used = ', '.join(map(str, chosen.unique().tolist()))
            pictures.append((_uri(tinted), f'{kind}s of {example.name}: {used}'))
        if pictures:
            found.append(Strip(short(name), pictures))
    return found


def _map(example: Example, layer: str) -> tuple[str, Tensor | None]:
    """The first that decides in a layer, at every patch."""
    for kind, maps in (('expert', example.experts), ('code', example.codes)):
        for name, chosen in maps.items():
            if name.startswith(f'{layer}.'):
                return kind, chosen
    slots = example.slots.get(layer)
    return 'expert', None if slots is None else slots.argmax(dim=0)


def _uri(image: Tensor) -> str:
    """The address of a picture (3, H, W) in [0, 1], no larger than the page shows it."""
    scale = min(PIXELS / max(image.shape[-2:]), 1)
    size = [max(round(scale * length), 1) for length in image.shape[-2:]]
    small = F.interpolate(image[None].float(), size, mode='area')[0].clamp(0, 1)
    data = io.BytesIO()
    pixels = (255 * small).round().byte().movedim(0, -1).numpy()
    Image.fromarray(pixels).save(data, 'webp', lossless=scale == 1, quality=85)
    return f'data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}'


def _loads(survey: Survey) -> Iterator[Load]:
    for name, layer in survey.layers.items():
        colours = expert_colours(layer.num_experts)
        for decider, load in layer.load.items():
            parts = []
            for expert, (share, colour) in enumerate(zip(load.tolist(), colours, strict=True)):
                ground = '#' + ''.join(f'{round(255 * c):02x}' for c in colour.tolist())
                light = (colour * colour.new_tensor([0.3, 0.6, 0.1])).sum() > 0.5
                parts.append((expert, 100 * share, ground, '#000' if light else '#fff'))
            yield Load(short(f'{name}.{decider}'), parts)
