"""Train, dev and test: what is tuned looks at dev, what is reported looks at test, once."""

from collections.abc import Sequence

import numpy as np
from sklearn.model_selection import train_test_split

SPLITS = ('train', 'dev', 'trainval', 'test')


def check_split(split: str) -> None:
    """Refuses what is not one of `SPLITS`.

    Raises:
        ValueError: Names the split and those that there are.
    """
    if split not in SPLITS:
        raise ValueError(f'split={split!r} must be one of {SPLITS}')


def split_indices(targets: Sequence[int], split: str, dev_size: int) -> list[int]:
    """Which of the training images belong to a split; always the same, classes in proportion.

    Args:
        targets: Class index of every training image.
        split: 'train', 'dev', or 'trainval' for both.
        dev_size: Number of images that 'train' leaves to 'dev'.

    Returns:
        Their indices, in rising order.

    Raises:
        ValueError: The split would be empty, or lack a class.
    """
    indices = np.arange(len(targets))
    if split == 'trainval':
        return indices.tolist()
    try:
        train, dev = train_test_split(indices, test_size=dev_size, stratify=targets, random_state=0)
    except ValueError as error:
        raise ValueError(
            f'dev_size={dev_size} is not possible with {len(targets)} training images: {error}'
        ) from error
    return sorted((train if split == 'train' else dev).tolist())
