"""Train, dev and test: what is tuned looks at dev, what is reported looks at test, once.

Of the training images a long tail may be kept; dev and test are as they are.
"""

from collections.abc import Sequence

import numpy as np

from vqmoe_vision.moe.config import check, check_type

Targets = Sequence[int] | np.ndarray
SPLITS = ('train', 'dev', 'trainval', 'test')


def check_split(split: str, dev_size: int) -> None:
    """Refuses what is not one of `SPLITS`, and a dev of no or of half an image."""
    check(split in SPLITS, 'split', split, f'one of {SPLITS}')
    check_type('dev_size', int, dev_size)
    least = int(split == 'dev')
    check(dev_size >= least, 'dev_size', dev_size, f'at least {least} with split={split!r}')


def split_indices(targets: Targets, split: str, dev_size: int, imbalance: float = 1) -> list[int]:
    """Which of the training images belong to a split; always the same, classes in proportion."""
    indices = np.arange(len(targets))
    if split == 'trainval' or (split == 'train' and dev_size == 0):
        return indices[long_tail(targets, imbalance)].tolist()
    from sklearn.model_selection import train_test_split  # here for the reason of `digit_scans`

    try:
        train, dev = train_test_split(indices, test_size=dev_size, stratify=targets, random_state=0)
    except ValueError as error:
        raise ValueError(
            f'dev_size={dev_size} is not possible with {len(targets)} training images: {error}'
        ) from error
    if split == 'dev':
        return sorted(dev.tolist())
    train = np.sort(train)
    return train[long_tail(np.asarray(targets)[train], imbalance)].tolist()


def long_tail(targets: Targets, imbalance: float) -> np.ndarray:
    """A long-tailed part of images; always the same, and part of that with a smaller imbalance."""
    # Cui et al. 2019 (arXiv 1901.05555), rounded as by Cao et al. 2019 (arXiv 1906.07413)
    check_type('imbalance', float, imbalance)
    valid = 1 <= imbalance < np.inf
    check(valid, 'imbalance', imbalance, 'at least 1, the largest class over the smallest')
    if imbalance == 1:
        return np.arange(len(targets))
    targets = np.asarray(targets)
    sizes = np.bincount(targets)
    # the same images in every run, whatever its seed
    rng, kept = np.random.default_rng(0), []
    for label, size in enumerate(sizes):
        count = int(sizes.max() * ((1 / imbalance) ** (label / max(len(sizes) - 1, 1))))
        check(count > 0, 'imbalance', imbalance, f'less, class {label} keeps none of {size} images')
        kept.append(rng.permutation(np.flatnonzero(targets == label))[:count])
    return np.sort(np.concatenate(kept))


def train_counts(targets: Targets, dev_size: int, imbalance: float) -> tuple[int, ...]:
    """Images that training sees of each class."""
    chosen = split_indices(targets, 'train', dev_size, imbalance)
    return tuple(np.bincount(np.asarray(targets)[chosen]).tolist())
