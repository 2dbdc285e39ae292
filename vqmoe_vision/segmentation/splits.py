"""A part of the training images that is set aside: what is chosen looks there, not at the test."""

import numpy as np

PARTS = ('all', 'train', 'dev')
_BLOCK = 20


def part_indices(num_pairs: int, part: str, dev_size: int) -> list[int]:
    """Which pairs belong to a part, always the same."""
    if part not in PARTS:
        raise ValueError(f'part={part!r} must be one of {PARTS}')
    if part == 'all':
        return list(range(num_pairs))
    if not 0 < dev_size < num_pairs:
        raise ValueError(
            f'dev_size={dev_size} must lie between 1 and {num_pairs - 1}, there are {num_pairs} '
            "pairs; or train on them with part='all'"
        )
    blocks = np.array_split(np.arange(num_pairs), -(-num_pairs // _BLOCK))
    order = np.random.default_rng(0).permutation(len(blocks))
    dev = np.concatenate([blocks[i] for i in order])[:dev_size]
    return sorted(dev.tolist() if part == 'dev' else set(range(num_pairs)) - set(dev.tolist()))
