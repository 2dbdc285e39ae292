"""The scans of handwritten digits that come with scikit-learn, split once for both tasks."""

import numpy as np

SPLITS = ('train', 'dev', 'test')
DIGITS = tuple(str(digit) for digit in range(10))


def digit_scans(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Scans (N, 8, 8) uint8, bright on black, and digits (N,); every digit in proportion."""
    if split not in SPLITS:
        raise ValueError(f'split={split!r} must be one of {SPLITS}')
    # here, because every tool reads this file, few the scans: a second of the eight to its start
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    def parted(indices: np.ndarray, size: int) -> list[np.ndarray]:
        return train_test_split(indices, test_size=size, stratify=targets[indices], random_state=0)

    images, targets = load_digits(return_X_y=True)
    rest, test = parted(np.arange(len(targets)), 360)
    train, dev = parted(rest, 180)
    chosen = {'train': train, 'dev': dev, 'test': test}[split]
    scans = np.round(images[chosen].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return scans, targets[chosen]
