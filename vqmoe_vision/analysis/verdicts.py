"""What is wrong with how a layer routes, in words, beyond what chance alone would give.

The entropy of the first expert is split into bits of position, of the image and of neither, by two
passes over the same images. Chance is redrawn: experts go to other images at the same position, or
to other positions of the same image, and loads are drawn even.

Legend: B images, N tokens per image, E experts, M codes, R draws.
"""

import math
from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from . import measures

DRAWS = 199  # of chance: what beats them all is seen with p = 1 / 200
INFORMED = 256  # images whose experts are kept for the bits
HEALTHY, COLLAPSED, IGNORES = 'healthy', 'collapsed', 'ignores the image'
BY_POSITION, DEAD_EXPERTS, DEAD_CODES = 'decided by position', 'experts dead', 'codes dead'


def bits_of_choice(first: Tensor, again: Tensor, num_experts: int) -> dict[str, float]:
    """Where the entropy of first experts (B, N), of two passes, comes from; {} of too few."""
    (images, tokens), kinds = first.shape, int(max(first.max(), again.max())) + 2
    one, two, draw = first.long() + 1, again.long() + 1, torch.Generator().manual_seed(0)
    of_image, place = torch.arange(images)[:, None], torch.arange(tokens)
    whole = measures.entropy(one.flatten().bincount()) / math.log(2)

    def told(by: Tensor, experts: Tensor) -> float:
        size = int(by.max()) + 1
        pairs = (by * kinds + experts).flatten().bincount(minlength=size * kinds)
        return measures.mutual_information(pairs.view(size, kinds)) / math.log(2)

    def moved(size: int, count: int) -> Tensor:
        return torch.randint(size, (count,), generator=draw)

    def other_image(two: Tensor) -> float:  # at the same position
        order = torch.randperm(images, generator=draw)
        return told(one, two[order[(of_image + moved(images, tokens)) % images], place])

    def other_place() -> float:  # of the same image, whose neighbours stay neighbours
        shifted = (place + moved(tokens, images)[:, None]) % tokens
        return told(place.expand_as(one), one[of_image, shifted])

    by_place, drawn = told(place.expand_as(one), one), [other_place() for _ in range(DRAWS)]
    position = by_place - sum(drawn) / DRAWS if by_place > max(drawn) + 1e-9 else 0.0
    repeated, most = told(one, two), max(other_image(two) for _ in range(DRAWS))
    image = max(repeated - position, 0.0) if repeated > most + 1e-9 else 0.0
    if image == position == 0:
        # if the image decided all, or each expert were as likely, chance could give as much
        seldom = num_experts ** (1 - one.numel()) < 1 / DRAWS
        enough = whole > max(other_image(one) for _ in range(DRAWS)) + 1e-9 if whole else seldom
        if not enough:
            return {}
    neither = max(whole - position - image, 0.0)
    return {'image_bits': image, 'position_bits': position, 'noise_bits': neither}


def bits_of_load(assigned: Tensor, num_tokens: float) -> dict[str, float]:
    """How much choice the load (E,) of counts leaves, and how much it lacks, in bits."""
    number, total = len(assigned), assigned.sum().item()
    each = min(max(total / max(num_tokens, 1), 1.0), number)  # K
    # as many assignments, drawn evenly
    drawn = np.random.default_rng(0).multinomial(round(total), [1 / number] * number, DRAWS)
    left = measures.entropy(assigned) / math.log(2) - math.log2(each)
    unused = math.log2(number / each) - left
    least = min(map(measures.entropy, torch.as_tensor(drawn))) / math.log(2)
    return {
        'load_bits': max(left, 0.0),
        'unused_bits': unused if unused > math.log2(number) - least else 0.0,
        'dead_by_chance': float((drawn == 0).sum(axis=1).max()),
    }


def by_decider(numbers: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Numbers of a layer that are of what decides in it."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for name, value in numbers.items():
        decider, of_decider, number = name.rpartition('/')
        if of_decider:
            found[decider][number] = value
    return found


def named(numbers: Mapping[str, float]) -> dict[str, list[str]]:
    """Words by decider, from the numbers of a layer; what is larger of two parts names it."""
    found = {}
    for decider, of in by_decider(numbers).items():
        collapsed = of.get('unused_bits', 0) > of.get('load_bits', 0)
        dead = of.get('dead_experts', 0) > of.get('dead_by_chance', 0)
        image, position, noise = (of.get(f'{n}_bits', -1) for n in ('image', 'position', 'noise'))
        said = {
            COLLAPSED: collapsed,
            DEAD_EXPERTS: dead and not collapsed,
            IGNORES: image == 0 or noise > max(image, position),
            BY_POSITION: position > max(image, noise),
            DEAD_CODES: of.get('dead_codes', 0) > of.get('dead_codes_by_chance', 0),
        }
        found[decider] = [word for word, true in said.items() if true]
    return found


def verdict(numbers: Mapping[str, float]) -> list[str]:
    """What is wrong with a layer, each word once; healthy if nothing is."""
    words = [word for of_decider in named(numbers).values() for word in of_decider]
    return list(dict.fromkeys(words)) or [HEALTHY]
