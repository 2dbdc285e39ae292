"""The scans of handwritten digits that come with scikit-learn, split once for both tasks."""

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

DIGITS = tuple(str(digit) for digit in range(10))


def digit_scans(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Scans and what they show; a fifth of each digit is held out, always the same.

    Args:
        split: 'train' (1,437 scans) or 'val' (360 scans).

    Returns:
        Scans (N, 8, 8), uint8, bright strokes on black; and the digits (N,).

    Raises:
        ValueError: There is no such split.
    """
    if split not in ('train', 'val'):
        raise ValueError(f"split={split!r} must be one of ('train', 'val')")
    images, targets = load_digits(return_X_y=True)
    parts = train_test_split(images, targets, test_size=0.2, stratify=targets, random_state=0)
    images, targets = (parts[0], parts[2]) if split == 'train' else (parts[1], parts[3])
    return np.round(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8), targets
