"""Data sets by name, for configs: images and class indices, through torchvision.

Nothing is downloaded here; docs/data.md says how each folder is made.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.registry import DATASETS
from PIL import Image
from torch.utils.data import Subset
from torchvision import datasets

from vqmoe_vision.engine.digits import DIGITS, digit_scans
from vqmoe_vision.engine.training_data import TrainingPart

from .class_folder import class_folder, folder_of, missing
from .image_classification import ImageClassification
from .splits import check_split, long_tail, split_indices, train_counts


@DATASETS.register_module(name='digits')
def digits(split: str, transform: dict, imbalance: float = 1) -> ImageClassification:
    """scikit-learn's 1,797 scans of handwritten digits, 8x8 pixels; comes with scikit-learn.

    Args:
        split: 'train' (1,257 images), 'dev' (180 images) or 'test' (360 images).
        transform: Config of the transform.
        imbalance: Largest class over smallest in 'train', as `splits.long_tail`.

    Raises:
        ValueError: There is no such split, or no such imbalance.
    """
    scans, targets = digit_scans(split)
    counts = train_counts(digit_scans('train')[1], 0, imbalance) if imbalance != 1 else None
    if split == 'train':
        chosen = long_tail(targets, imbalance)
        scans, targets = scans[chosen], targets[chosen]
    pairs = [(Image.fromarray(scan), target) for scan, target in zip(scans, targets, strict=True)]
    return ImageClassification(pairs, DIGITS, transform, counts, list(map(str, targets)))


def _cifar(
    name: str, folder: str, root: Path, split: str, transform: dict, **options: Any
) -> ImageClassification:
    """Either layout that is around: class folders, or the archives that torchvision reads."""
    check_split(split, options['dev_size'])
    if any((root / part).is_dir() for part in ('train', 'val', 'test')):
        if options['dev_size'] == 0:  # of class folders this says that split names a folder
            split = folder_of(split, root)
        return class_folder(str(root), split, transform, **options)
    if not (root / folder).is_dir():
        raise missing(
            root / folder, f"{root}/{folder}/ (torchvision's) or {root}/train/<class name>/*.png"
        )

    def read(train: bool) -> Any:
        return _read(getattr(datasets, name), root / folder, root=str(root), train=train)

    part = TrainingPart((str((root / folder).resolve()),), split, options['dev_size'])
    return _part(read, 'targets', part, transform, options['imbalance'])


def _part(
    read: Callable[[bool], Any],
    field: str,
    part: TrainingPart,
    transform: dict,
    imbalance: float,
) -> ImageClassification:
    _, split, dev_size = part
    source, counts = read(split != 'test'), None
    classes = getattr(source, 'classes', DIGITS)  # SVHN's have no names
    if imbalance != 1:
        training = source if split != 'test' else read(True)
        counts = train_counts(getattr(training, field), dev_size, imbalance)
    targets = np.asarray(getattr(source, field))
    if split != 'test':
        chosen = split_indices(targets, split, dev_size, imbalance)
        source, targets = Subset(source, chosen), targets[chosen]
    return ImageClassification(source, classes, transform, counts, list(map(str, targets)), part)


@DATASETS.register_module(name='cifar10')
def cifar10(
    data_root: str,
    split: str,
    transform: dict,
    in_memory: bool = False,
    dev_size: int = 5000,
    imbalance: float = 1,
) -> ImageClassification:
    """CIFAR-10: class folders if there are some, else torchvision's layout.

    Args:
        data_root: Folder that holds `train` and `test` or `val`, or `cifar-10-batches-py`.
        split: One of `splits.SPLITS`.
        transform: Config of the transform.
        in_memory: Decode class folders once, at the start; torchvision's layout always is.
        dev_size: Training images that are set aside as 'dev'; 0 for none.
        imbalance: Largest class over smallest in 'train' and 'trainval', as `splits.long_tail`.

    Raises:
        ValueError: The folder is missing or laid out otherwise.
    """
    options = {'in_memory': in_memory, 'dev_size': dev_size, 'imbalance': imbalance}
    return _cifar('CIFAR10', 'cifar-10-batches-py', Path(data_root), split, transform, **options)


@DATASETS.register_module(name='cifar100')
def cifar100(
    data_root: str,
    split: str,
    transform: dict,
    in_memory: bool = False,
    dev_size: int = 5000,
    imbalance: float = 1,
) -> ImageClassification:
    """CIFAR-100, in the same two layouts as `cifar10`.

    Args:
        data_root: Folder that holds `train` and `test` or `val`, or `cifar-100-python`.
        split: One of `splits.SPLITS`.
        transform: Config of the transform.
        in_memory: Decode class folders once, at the start; torchvision's layout always is.
        dev_size: Training images that are set aside as 'dev'; 0 for none.
        imbalance: Largest class over smallest in 'train' and 'trainval', as `splits.long_tail`.

    Raises:
        ValueError: The folder is missing or laid out otherwise.
    """
    options = {'in_memory': in_memory, 'dev_size': dev_size, 'imbalance': imbalance}
    return _cifar('CIFAR100', 'cifar-100-python', Path(data_root), split, transform, **options)


@DATASETS.register_module(name='stl10')
def stl10(
    data_root: str, split: str, transform: dict, dev_size: int = 500, imbalance: float = 1
) -> ImageClassification:
    """STL-10: 5,000 labelled training and 8,000 test images of 96x96 pixels.

    Args:
        data_root: Folder that holds `stl10_binary`.
        split: One of `splits.SPLITS`.
        transform: Config of the transform.
        dev_size: Training images that are set aside as 'dev'; 0 for none.
        imbalance: Largest class over smallest in 'train' and 'trainval', as `splits.long_tail`.

    Raises:
        ValueError: The folder is missing or incomplete.
    """
    check_split(split, dev_size)
    folder = Path(data_root) / 'stl10_binary'
    if not folder.is_dir():
        raise missing(
            folder, f'{folder}/{{train,test}}_{{X,y}}.bin, unlabeled_X.bin, class_names.txt'
        )

    def read(train: bool) -> Any:
        kind = 'train' if train else 'test'
        return _read(datasets.STL10, folder, root=data_root, split=kind)

    part = TrainingPart((str(folder.resolve()),), split, dev_size)
    return _part(read, 'labels', part, transform, imbalance)


@DATASETS.register_module(name='svhn')
def svhn(
    data_root: str, split: str, transform: dict, dev_size: int = 5000, imbalance: float = 1
) -> ImageClassification:
    """SVHN, cropped digits: 73,257 training and 26,032 test images of 32x32 pixels.

    Args:
        data_root: Folder that holds `train_32x32.mat` and `test_32x32.mat`.
        split: One of `splits.SPLITS`.
        transform: Config of the transform.
        dev_size: Training images that are set aside as 'dev'; 0 for none.
        imbalance: Largest class over smallest in 'train' and 'trainval', as `splits.long_tail`.

    Raises:
        ValueError: The file is missing or damaged.
    """
    check_split(split, dev_size)

    def read(train: bool) -> Any:
        kind = 'train' if train else 'test'
        file = Path(data_root) / f'{kind}_32x32.mat'
        if not file.is_file():
            raise missing(file, f'{data_root}/{{train,test}}_32x32.mat')
        return _read(datasets.SVHN, file, root=data_root, split=kind)

    part = TrainingPart((str(Path(data_root).resolve()),), split, dev_size)
    return _part(read, 'labels', part, transform, imbalance)


def _read(reader: Callable[..., Any], path: Path, **kwargs: Any) -> Any:
    """Calls a torchvision data set, which checks the files' checksums."""
    try:
        return reader(**kwargs)
    except RuntimeError as error:
        raise ValueError(f'{path} is incomplete or damaged ({error}); see docs/data.md') from error
