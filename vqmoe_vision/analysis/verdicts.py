"""What is wrong with how a layer routes, in words, beyond what chance alone would give.

The entropy of the first expert is split into bits of position, of the image and of neither, by two
passes over the same images. Chance is redrawn: experts go to other images at the same position, or
to other positions of the same image, and loads are drawn even.

Legend: B images, N tokens per image, E experts, M codes, R draws.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from . import measures

DRAWS = 199  # of chance: what beats them all is seen with p = 1 / 200
INFORMED = 256  # images whose experts are kept for the bits
HEALTHY, COLLAPSED, IGNORES = 'healthy', 'collapsed', 'ignores the image'
BY_POSITION, DEAD_EXPERTS, DEAD_CODES = 'decided by position', 'experts dead', 'codes dead'


def bits_of_choice(first: Tensor, again: Tensor) -> dict[str, float]:
    """Where the entropy of first experts comes from, in bits.

    Args:
        first: Of every token, (B, N) in [-1, E).
        again: The same of another pass over the same images.
    """
    (images, tokens), kinds = first.shape, int(max(first.max(), again.max())) + 2
    one, two, draw = first.long() + 1, again.long() + 1, torch.Generator().manual_seed(0)
    of_image, place = torch.arange(images)[:, None], torch.arange(tokens)

    def told(by: Tensor, experts: Tensor) -> float:
        size = int(by.max()) + 1
        pairs = (by * kinds + experts).flatten().bincount(minlength=size * kinds)
        return measures.mutual_information(pairs.view(size, kinds)) / math.log(2)

    def moved(size: int, count: int) -> Tensor:
        return torch.randint(size, (count,), generator=draw)

    def other_image(_: int) -> float:  # at the same position
        return told(one, two[(of_image + moved(images, tokens)) % images, place])

    def other_place(_: int) -> float:  # of the same image, whose neighbours stay neighbours
        shifted = (place + moved(tokens, images)[:, None]) % tokens
        return told(place.expand_as(one), one[of_image, shifted])

    def beyond(seen: float, chance: Callable[[int], float]) -> tuple[bool, float]:
        drawn = [*map(chance, range(DRAWS))]
        return seen > max(drawn) + 1e-9, sum(drawn) / DRAWS

    whole = measures.entropy(one.flatten().bincount()) / math.log(2)
    by_place, repeated = told(place.expand_as(one), one), told(one, two)
    placed, by_chance = beyond(by_place, other_place)
    position = by_place - by_chance if placed else 0.0
    noticed, _ = beyond(repeated, other_image)
    image = max(repeated - position, 0.0) if noticed else 0.0
    neither = max(whole - position - image, 0.0)
    return {'image_bits': image, 'position_bits': position, 'noise_bits': neither}


def bits_of_load(assigned: Tensor, num_tokens: float) -> dict[str, float]:
    """How much choice the load (E,) of counts leaves, and how much it lacks, in bits."""
    number, total = len(assigned), assigned.sum().item()
    each = min(max(total / max(num_tokens, 1), 1.0), number)  # K
    drawn = _even(total, number)
    left = measures.entropy(assigned) / math.log(2) - math.log2(each)
    unused = math.log2(number / each) - left
    least = min(measures.entropy(torch.as_tensor(load)) for load in drawn) / math.log(2)
    return {
        'load_bits': max(left, 0.0),
        'unused_bits': unused if unused > math.log2(number) - least else 0.0,
        'dead_by_chance': _empty(drawn),
    }


def dead_by_chance(usage: Tensor) -> float:
    """The most of M codes that get nothing in any draw of as many tokens, all codes alike."""
    return _empty(_even(usage.sum().item(), len(usage)))


def _even(total: float, number: int) -> np.ndarray:
    return np.random.default_rng(0).multinomial(round(total), [1 / number] * number, DRAWS)


def _empty(drawn: np.ndarray) -> float:
    return float((drawn == 0).sum(axis=1).max())


def named(numbers: Mapping[str, float]) -> dict[str, list[str]]:
    """Words by decider, from the numbers of a layer; what is larger of two parts names it."""
    deciders = dict.fromkeys(n.rpartition('/')[0] for n in numbers if '/' in n)
    found = {}
    for decider in deciders:
        start = f'{decider}/'
        of = {n[len(start) :]: v for n, v in numbers.items() if n.startswith(start)}
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
