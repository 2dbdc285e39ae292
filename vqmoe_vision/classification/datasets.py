"""Data sets by name, for configs: images and class indices, through torchvision.

Nothing is downloaded here; docs/how-to/data.md says how each folder is made. What is tuned
looks at dev, what is reported looks at test, once. Of the training images a long tail may be kept.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from mmengine.logging import print_log
from mmengine.registry import DATASETS, TRANSFORMS
from PIL import Image
from torch.utils.data import Dataset, Subset
from torchvision import datasets

from vqmoe_vision.engine.images import DIGITS, TrainingPart, digit_scans, opened, read_rgb
from vqmoe_vision.engine.seeding import seed_sample
from vqmoe_vision.models.normalization import Normalization
from vqmoe_vision.moe.config import check, check_type

from .transforms import normalized_as

SPLITS = ('train', 'dev', 'trainval', 'test')


def _check_split(split: str, dev_size: int) -> None:
    check(split in SPLITS, 'split', split, f'one of {SPLITS}')
    check_type('dev_size', int, dev_size)
    least = int(split == 'dev')
    check(dev_size >= least, 'dev_size', dev_size, f'at least {least} with split={split!r}')


def split_indices(targets: Any, split: str, dev_size: int, imbalance: float = 1) -> list[int]:
    """Which of the training images belong to a split; always the same, classes in proportion."""
    train = np.arange(len(targets))
    if split != 'trainval' and (split, dev_size) != ('train', 0):
        from sklearn.model_selection import train_test_split  # here for the reason of `_all_digits`

        try:
            train, dev = train_test_split(
                train, test_size=dev_size, stratify=targets, random_state=0
            )
        except ValueError as error:
            raise ValueError(
                f'dev_size={dev_size} is not possible with {len(targets)} training images: {error}'
            ) from error
        if split == 'dev':
            return sorted(dev.tolist())
        train = np.sort(train)
    return train[long_tail(np.asarray(targets)[train], imbalance)].tolist()


def long_tail(targets: Any, imbalance: float) -> np.ndarray:
    """A long-tailed part of images; always the same, and part of that with a smaller imbalance."""
    # Cui et al. 2019 (arXiv 1901.05555), rounded as by Cao et al. 2019 (arXiv 1906.07413)
    check_type('imbalance', float, imbalance)
    check(
        1 <= imbalance < np.inf, 'imbalance', imbalance, 'at least 1, largest class over smallest'
    )
    if imbalance == 1:
        return np.arange(len(targets))
    sizes = np.bincount(targets)
    # the same images in every run, whatever its seed
    rng, kept = np.random.default_rng(0), []
    for label, size in enumerate(sizes):
        count = int(sizes.max() * ((1 / imbalance) ** (label / max(len(sizes) - 1, 1))))
        check(count > 0, 'imbalance', imbalance, f'less, class {label} keeps none of {size} images')
        kept.append(rng.permutation(np.flatnonzero(np.asarray(targets) == label))[:count])
    return np.sort(np.concatenate(kept))


def _train_counts(targets: Any, dev_size: int, imbalance: float) -> tuple[int, ...] | None:
    """Images that training sees of each class; None without a long tail."""
    if imbalance == 1:
        return None
    seen = np.asarray(targets)[split_indices(targets, 'train', dev_size, imbalance)]
    return tuple(np.bincount(seen).tolist())


class WrappedError(ValueError, AttributeError):
    """A mistake of a user, and to mmengine's runner, which asks for `full_init`, no such method."""


class ImageClassification(Dataset):
    """Pairs of a transformed image (3, H, W) and its class index, of RGB PIL images in `source`."""

    def __init__(
        self,
        source: Sequence,
        classes: Sequence[str],
        transform: dict,
        counts: tuple[int, ...] | None = None,
        names: Sequence[str] | None = None,
        part: TrainingPart | None = None,
    ) -> None:
        self.source, self.names, self.training_part = source, names, part
        self.metainfo: dict = {'classes': tuple(classes)}
        if counts is not None:
            self.metainfo['train_counts'] = counts
        self._config = transform
        self.transform = TRANSFORMS.build(transform)

    def normalize_as(self, weights: Normalization, field: str, owner: str) -> None:
        """Normalises images as the weights want it, if the config of the transform allows it."""
        self.transform = normalized_as(self._config, weights, field, owner)

    @property
    def full_init(self) -> NoReturn:
        """What mmengine's wrappers call first; they would hide the transform."""
        raise WrappedError(
            'dataset.type is a wrapper of data sets, and those of classification stand in none: '
            'train longer, or put all images into one folder per class'
        )

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        seed_sample(index)
        image, target = self.source[index]
        return self.transform(image.convert('RGB')), int(target)


@DATASETS.register_module(name='class_folder')
def class_folder(
    data_root: str,
    split: str,
    transform: dict,
    in_memory: bool = False,
    dev_size: int = 0,
    imbalance: float = 1,
) -> ImageClassification:
    """A folder per class: `<data_root>/<split>/<class>/<image>`, as ImageNet is laid out.

    Args:
        data_root: Folder with one folder per split.
        split: Name of a folder, usually 'train' or 'val'; with `dev_size` 'train', 'dev' or
            'trainval', which are the folder 'train', or 'test', which is the folder 'test' or, if
            there is none, 'val'.
        transform: Config of the transform.
        in_memory: Decode every image once, at the start; for small images.
        dev_size: Number of images of 'train' that are set aside as 'dev'; 0 for none.
        imbalance: Largest class over smallest in 'train' and 'trainval', as `long_tail`.

    Raises:
        ValueError: The folder is missing or laid out otherwise, an image cannot be read, or there
            is no such split or no such imbalance.
    """
    root = Path(data_root)
    folder, train = root / split, root / 'train'
    if dev_size != 0:
        _check_split(split, dev_size)
        folder = root / _folder_of(split, root)
    source = _image_folder(folder)
    classes, part = source.classes, None
    trained = source if folder == train or imbalance == 1 else _image_folder(train)
    counts = _train_counts(trained.targets, dev_size, imbalance)
    if folder == train:
        named = split if dev_size else 'train'  # a path may say that in other ways
        part = TrainingPart((str(train.resolve()),), named, dev_size)
        chosen = split_indices(source.targets, named, dev_size, imbalance)
        source.samples = [source.samples[i] for i in chosen]
    # a `Path` of each would take seconds of ImageNet
    names = [path[len(f'{folder}/') :] for path, _ in source.samples]
    if in_memory:
        source = [(load_image(path), target) for path, target in source.samples]
    return ImageClassification(source, classes, transform, counts, names, part)


def _folder_of(split: str, root: Path) -> str:
    held_out = 'test' if (root / 'test').is_dir() else 'val'
    return held_out if split == 'test' else 'train'


def _image_folder(folder: Path) -> datasets.ImageFolder:
    endings = datasets.folder.IMG_EXTENSIONS
    left_out: Any = []
    try:
        found = datasets.ImageFolder(
            str(folder),
            loader=load_image,
            is_valid_file=lambda path: path.lower().endswith(endings) or left_out.append(path),
        )
    except FileNotFoundError as error:  # no such folder, no class in it, or one without an image
        raise ValueError(
            f'{folder} is not laid out as {folder}/<class name>/<image>, of images that end in '
            f'{", ".join(endings)}: {str(error).rstrip(". ")}; see docs/how-to/data.md'
        ) from error
    if left_out:
        told = f'{len(left_out)} files are left out for their endings, such as {left_out[0]}'
        print_log(told, 'current', logging.WARNING)
    return found


def load_image(path: str) -> Image.Image:
    """Reads an image file as RGB, the way it is meant to be seen."""
    with opened(path, path) as image:
        return read_rgb(image, path)


@DATASETS.register_module(name='digits')
def digits(split: str, transform: dict, imbalance: float = 1) -> ImageClassification:
    """scikit-learn's 1,797 scans of handwritten digits, 8x8 pixels; comes with scikit-learn.

    Args:
        split: 'train' (1,257 images), 'dev' (180 images) or 'test' (360 images).
        transform: Config of the transform.
        imbalance: Largest class over smallest in 'train', as `long_tail`.

    Raises:
        ValueError: There is no such split, or no such imbalance.
    """
    scans, targets = digit_scans(split)
    counts = _train_counts(targets if imbalance == 1 else digit_scans('train')[1], 0, imbalance)
    if split == 'train':
        chosen = long_tail(targets, imbalance)
        scans, targets = scans[chosen], targets[chosen]
    pairs = list(zip(map(Image.fromarray, scans), targets, strict=True))
    return ImageClassification(pairs, DIGITS, transform, counts, list(map(str, targets)))


@DATASETS.register_module(name='cifar10')
def cifar10(data_root: str, **options: Any) -> ImageClassification:
    """CIFAR-10: class folders if there are some, else torchvision's layout, always in memory.

    Args:
        data_root: Folder that holds `train` and `test` or `val`, or `cifar-10-batches-py`.
        **options: As `class_folder`, of which `split` is one of `SPLITS`; `dev_size` is 5000
            where it is left out.

    Raises:
        ValueError: The folder is missing or laid out otherwise.
    """
    return _cifar(datasets.CIFAR10, Path(data_root), **options)


@DATASETS.register_module(name='cifar100')
def cifar100(data_root: str, **options: Any) -> ImageClassification:
    """CIFAR-100, as `cifar10`, in torchvision's layout `cifar-100-python`.

    Args:
        data_root: As `cifar10`.
        **options: As `cifar10`.
    """
    return _cifar(datasets.CIFAR100, Path(data_root), **options)


def _cifar(
    reader: Any,
    root: Path,
    split: str,
    transform: dict,
    in_memory: bool = False,
    dev_size: int = 5000,
    imbalance: float = 1,
) -> ImageClassification:
    _check_split(split, dev_size)
    if any((root / part).is_dir() for part in ('train', 'val', 'test')):
        if dev_size == 0:  # of class folders this says that split names a folder
            split = _folder_of(split, root)
        return class_folder(str(root), split, transform, in_memory, dev_size, imbalance)
    return _part(reader, root, reader.base_folder, split, transform, dev_size, imbalance)


@DATASETS.register_module(name='stl10')
def stl10(data_root: str, **options: Any) -> ImageClassification:
    """STL-10: 5,000 labelled training and 8,000 test images of 96x96 pixels.

    Args:
        data_root: Folder that holds `stl10_binary`.
        **options: As `cifar10`, without `in_memory`; `dev_size` is 500 where it is left out.

    Raises:
        ValueError: The folder is missing or incomplete.
    """
    return _part(datasets.STL10, data_root, 'stl10_binary', **{'dev_size': 500, **options})


@DATASETS.register_module(name='svhn')
def svhn(data_root: str, **options: Any) -> ImageClassification:
    """SVHN, cropped digits: 73,257 training and 26,032 test images of 32x32 pixels.

    Args:
        data_root: Folder that holds `train_32x32.mat` and `test_32x32.mat`.
        **options: As `cifar10`, without `in_memory`.

    Raises:
        ValueError: The file is missing or damaged.
    """
    return _part(datasets.SVHN, data_root, '', **options)


def _part(
    reader: Any,
    root: str | Path,
    folder: str,
    split: str,
    transform: dict,
    dev_size: int = 5000,
    imbalance: float = 1,
) -> ImageClassification:
    """A split of a data set of torchvision, which checks the files' checksums."""
    _check_split(split, dev_size)
    place = Path(root) / folder

    def read(train: bool) -> tuple[Any, np.ndarray]:
        part = train if issubclass(reader, datasets.CIFAR10) else 'train' if train else 'test'
        try:
            found = reader(str(root), part)
        except RuntimeError as error:
            raise ValueError(f'{place} is not whole ({error}), see docs/how-to/data.md') from error
        return found, np.asarray(found.targets if hasattr(found, 'targets') else found.labels)

    source, targets = read(split != 'test')
    classes = getattr(source, 'classes', DIGITS)  # SVHN's have no names
    trained = read(True)[1] if split == 'test' and imbalance != 1 else targets
    counts = _train_counts(trained, dev_size, imbalance)
    if split != 'test':
        chosen = split_indices(targets, split, dev_size, imbalance)
        source, targets = Subset(source, chosen), targets[chosen]
    part = TrainingPart((str(place.resolve()),), split, dev_size)
    return ImageClassification(source, classes, transform, counts, list(map(str, targets)), part)
