"""The first screen of a report: a line per layer, photographs in the colours of experts, the load.

Needs pillow, which comes with matplotlib (extra `train`).
"""

import base64
import io
import math
from typing import Any

import torch.nn.functional as F
from matplotlib.colors import to_hex
from PIL import Image
from torch import Tensor

from . import verdicts
from .pictures import expert_colours, short, tint_patches
from .survey import Example, Survey
from .tally import LayerSurvey

PHOTOS, SHOWN, PIXELS = 4, 3, 240  # photographs, layers below them, and the most of a side
SAID = {  # with the numbers of a decider
    verdicts.COLLAPSED: '{load_bits:.2f} of {all_bits:.2f} bits are left',
    verdicts.IGNORES: '{image_bits:.2f} bits between expert and image',
    verdicts.BY_POSITION: '{position_bits:.2f} bits, the image {image_bits:.2f}',
    verdicts.DEAD_EXPERTS: '{dead_experts:.0f} of {number}',
    verdicts.DEAD_CODES: '{dead_codes:.0f}, {code_perplexity:.1f} in use',
}


def overview(survey: Survey) -> dict[str, Any]:
    """What the template shows of a model; of its layers, those that are not healthy come first."""
    lines = [_line(name, layer) for name, layer in survey.layers.items()]
    worst = [line['layer'] for line in sorted(lines, key=lambda line: line['healthy'])[:SHOWN]]
    photos = survey.examples[:PHOTOS]
    strips = [('', [(_uri(example.image), example.name) for example in photos])] if photos else []
    for name, layer in survey.layers.items():
        maps = [(example, _map(example, name)) for example in photos if short(name) in worst]
        if shown := [_tinted(e, chosen, layer) for e, chosen in maps if chosen is not None]:
            strips.append((short(name), shown))
    loads = {
        short(f'{name}.{decider}'): [
            (expert, 100 * share, to_hex(colour))
            for expert, (share, colour) in enumerate(
                zip(load.tolist(), expert_colours(len(load)).tolist(), strict=True)
            )
        ]
        for name, layer in survey.layers.items()
        for decider, load in layer.load.items()
    }
    return {'survey': survey, 'lines': lines, 'strips': strips, 'loads': loads}


def _line(name: str, layer: LayerSurvey) -> dict[str, Any]:
    """What is said of a layer, and by decider the bits of each part and their percent."""
    words, said, bars, seen = verdicts.named(layer.numbers), [], {}, []
    for decider, own in words.items():
        start, most = f'{decider}/', math.log2(max(layer.num_experts, 2))
        of = {n[len(start) :]: v for n, v in layer.numbers.items() if n.startswith(start)}
        of |= {'number': layer.num_experts}
        of['all_bits'] = of.get('load_bits', 0) + of.get('unused_bits', 0)
        text = ', '.join(f'{word}: {SAID[word].format(**of)}' for word in own)
        said += [f'{short(decider)} {text}' if len(words) > 1 else text] if own else []
        if 'image_bits' in of:
            seen.append(f'{of["image_bits"]:.2f}')
            bits = [(part, of[f'{part}_bits']) for part in ('image', 'position', 'noise')]
            bits.append(('unused', max(most - sum(b for _, b in bits), 0.0)))
            bars[short(decider)] = [(part, b, 100 * b / most) for part, b in bits]
    number = f'{" and ".join(seen)} bits between expert and image' if seen else 'nothing is dead'
    healthy = f'{verdicts.HEALTHY}: {number}'
    text = '; '.join(said) or healthy
    return {'layer': short(name), 'healthy': not said, 'said': text, 'bars': bars}


def _map(example: Example, layer: str) -> Tensor | None:
    """What the first that decides in a layer chose at every patch."""
    for name, chosen in (example.experts | example.codes).items():
        if name.startswith(f'{layer}.'):
            return chosen
    return example.slots[layer].argmax(dim=0) if layer in example.slots else None


def _tinted(example: Example, chosen: Tensor, layer: LayerSurvey) -> tuple[str, str]:
    number = max(int(chosen.max()) + 1, layer.num_experts)
    used = ', '.join(map(str, chosen.unique().tolist()))
    tinted = tint_patches(example.image[None], chosen[None], number)[0]
    return _uri(tinted), f'{example.name}: chosen are {used}'


def _uri(image: Tensor) -> str:
    """The address of a picture (3, H, W) in [0, 1], no larger than the page shows it."""
    scale = min(PIXELS / max(image.shape[-2:]), 1)
    size = [max(round(scale * length), 1) for length in image.shape[-2:]]
    small, data = F.interpolate(image[None].float(), size, mode='area')[0].clamp(0, 1), io.BytesIO()
    pixels = (255 * small).round().byte().movedim(0, -1).numpy()
    Image.fromarray(pixels).save(data, 'webp', lossless=scale == 1, quality=85)
    return f'data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}'
