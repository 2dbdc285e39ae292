"""The first screen of a report: a line per layer, photographs in the colours of experts, the load.

Needs pillow, which comes with matplotlib (extra `train`).
"""

import base64
import io
import math
from collections.abc import Iterator
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.colors import to_hex
from PIL import Image
from torch import Tensor

from . import verdicts
from .pictures import expert_colours, percent, short, tint_patches
from .survey import Example, Survey
from .tally import LayerSurvey

SHOWN, PIXELS = 3, 160  # layers below the photographs, and the most of a side
SAID = {  # with the numbers of a decider
    verdicts.COLLAPSED: '{load_bits:.2f} of {all_bits:.2f} bits are left',
    verdicts.IGNORES: '{image_bits:.2f} bits between expert and image',
    verdicts.BY_POSITION: '{position_bits:.2f} bits, the image {image_bits:.2f}',
    verdicts.DEAD_EXPERTS: '{dead_experts:.0f} of {number}',
    verdicts.DEAD_CODES: '{dead_codes:.0f}, {code_perplexity:.1f} in use',
}


def overview(survey: Survey) -> dict[str, Any]:
    """What the template shows of a model; of its layers, those that are not healthy come first."""
    photos = survey.examples
    lines = [
        {**_line(name, layer), 'strips': [*_strips(photos, name, layer), *_surest(layer)]}
        for name, layer in survey.layers.items()
    ]
    worst = [line['layer'] for line in sorted(lines, key=lambda line: line['healthy'])[:SHOWN]]
    strips = [('', [(_uri(photo.image), photo.name) for photo in photos])] if photos else []
    shown = [line for line in lines if line['layer'] in worst and line['strips']]
    strips += [(line['layer'], line['strips'][0][1]) for line in shown if photos]
    loads = {
        short(f'{name}.{decider}'): [
            (100 * share, to_hex(colour))
            for share, colour in zip(load.tolist(), expert_colours(len(load)).tolist(), strict=True)
        ]
        for name, layer in survey.layers.items()
        for decider, load in layer.load.items()
    }
    return {'survey': survey, 'lines': lines, 'strips': strips, 'loads': loads}


def _line(name: str, layer: LayerSurvey) -> dict[str, Any]:
    """What is said of a layer, and by decider the bits of each part and their percent."""
    words, numbers = verdicts.named(layer.numbers), verdicts.by_decider(layer.numbers)
    said, bars, seen, most = [], {}, [], math.log2(max(layer.num_experts, 2))
    for decider, own in words.items():
        of: Any = {**numbers[decider], 'number': layer.num_experts}
        of['all_bits'] = of.get('load_bits', 0) + of.get('unused_bits', 0)
        text = ', '.join(f'{word}: {SAID[word].format(**of)}' for word in own)
        said += [f'{short(decider)} {text}' if len(words) > 1 else text] if own else []
        if 'image_bits' in of:
            seen.append(f'{of["image_bits"]:.2f}')
            bits = [(part, of[f'{part}_bits']) for part in ('image', 'position', 'noise')]
            bits.append(('unused', max(most - sum(b for _, b in bits), 0.0)))
            bars[short(decider)] = [(part, b, 100 * b / most) for part, b in bits]
    number = f'{" and ".join(seen)} bits between expert and image' if seen else 'nothing is dead'
    text = '; '.join(said) or f'{verdicts.HEALTHY}: {number}'
    return {'layer': short(name), 'healthy': not said, 'said': text, 'bars': bars}


def _strips(photos: list[Example], name: str, layer: LayerSurvey) -> list[tuple[str, list]]:
    """What a layer does with each photograph, a row for all that it is made of."""
    strips = []
    for kind in photos[0].maps.get(name, ()) if photos else ():
        maps = [(p, p.maps[name][kind]) for p in photos if kind in p.maps.get(name, ())]
        number = max(layer.num_experts, *(int(chosen.max()) + 1 for _, chosen in maps))
        strips.append((short(kind), [_drawn(photo, chosen, number) for photo, chosen in maps]))
    return strips


def _surest(layer: LayerSurvey) -> Iterator[tuple[str, list]]:
    """The patches that each expert takes with the largest weights, these first."""
    for decider, patches in layer.confident.items():
        for expert, own in enumerate(patches):
            if own:
                share, weights = layer.load[decider][expert].item(), [patch.weight for patch in own]
                said = (
                    f'{short(decider)}: expert {expert} takes {percent(share)}, these with weights'
                )
                said += f' from {min(weights):.2f} to {max(weights):.2f}'
                yield said, [(_uri(torch.cat([patch.pixels for patch in own], dim=-1), 320), said)]


def _drawn(photo: Example, chosen: Tensor, number: int) -> tuple[str, str]:
    if chosen.is_floating_point():  # shares, from dark to bright
        bright = matplotlib.colormaps['viridis'](chosen.numpy())
        return _uri(torch.as_tensor(bright)[..., :3].movedim(-1, 0)), photo.name
    used = ', '.join(map(str, chosen.unique().tolist()))
    tinted = tint_patches(photo.image[None], chosen[None], number)[0]
    return _uri(tinted), f'{photo.name}: chosen are {used}'


def _uri(image: Tensor, most: int = PIXELS) -> str:
    """The address of a picture (3, H, W) in [0, 1], no larger than the page shows it."""
    scale = min(most / max(image.shape[-2:]), 1)
    size = [max(round(scale * length), 1) for length in image.shape[-2:]]
    small, data = F.interpolate(image[None].float(), size, mode='area')[0].clamp(0, 1), io.BytesIO()
    pixels = (255 * small).round().byte().movedim(0, -1).numpy()
    Image.fromarray(pixels).save(data, 'webp', lossless=most == PIXELS > max(size), quality=80)
    return f'data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}'
