"""Data sets by name, for configs: images and class indices, through torchvision.

A config's dataset is `dict(type='cifar10', data_root=..., split=..., transform=dict(...))`. Nothing
is downloaded here; docs/data.md says how each folder is made.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmengine.registry import DATASETS, TRANSFORMS
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset
from torchvision import datasets

from vqmoe_vision.engine.digits import DIGITS, digit_scans
from vqmoe_vision.engine.seeding import seed_sample


class ImageClassification(Dataset):
    """Pairs of a transformed image and its class index.

    Args:
        source: Pairs of an RGB PIL image and a class index.
        classes: Names of the classes, by index.
        transform: Config of a transform from a PIL image to a tensor (3, H, W).
    """

    def __init__(self, source: Sequence, classes: Sequence[str], transform: dict) -> None:
        self.source = source
        self.metainfo = {'classes': tuple(classes)}
        self.transform: Callable = TRANSFORMS.build(transform)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        seed_sample(index)
        image, target = self.source[index]
        return self.transform(image.convert('RGB')), int(target)


@DATASETS.register_module(name='digits')
def digits(split: str, transform: dict) -> ImageClassification:
    """scikit-learn's 1,797 scans of handwritten digits, 8x8 pixels; comes with scikit-learn.

    A fifth of each class is held out, always the same.

    Args:
        split: 'train' (1,437 images) or 'val' (360 images).
        transform: Config of the transform.

    Raises:
        ValueError: There is no such split.
    """
    scans, targets = digit_scans(split)
    pairs = [(Image.fromarray(scan), target) for scan, target in zip(scans, targets, strict=True)]
    return ImageClassification(pairs, DIGITS, transform)


@DATASETS.register_module(name='class_folder')
def class_folder(
    data_root: str, split: str, transform: dict, in_memory: bool = False
) -> ImageClassification:
    """A folder per class: `<data_root>/<split>/<class>/<image>`, as ImageNet is laid out.

    Args:
        data_root: Folder with one folder per split.
        split: Name of the split, usually 'train' or 'val'.
        transform: Config of the transform.
        in_memory: Decode every image once, at the start; for small images.

    Raises:
        ValueError: The folder is missing or laid out otherwise, or an image cannot be read.
    """
    folder = Path(data_root) / split
    expected = f'{folder}/<class name>/<image>.jpg (or .png, ...)'
    if not folder.is_dir():
        raise _missing(folder, expected)
    try:
        source: Any = datasets.ImageFolder(str(folder), loader=load_image)
    except FileNotFoundError as error:  # no class folder, or one without an image
        raise ValueError(
            f'{folder} is not laid out as {expected}: {error}; see docs/data.md'
        ) from error
    classes = source.classes
    if in_memory:
        source = [(load_image(path), target) for path, target in source.samples]
    return ImageClassification(source, classes, transform)


def load_image(path: str) -> Image.Image:
    """Reads an image file as RGB.

    Args:
        path: The file.

    Raises:
        ValueError: The file is not an image, or is damaged.
    """
    try:
        with Image.open(path) as image:
            return image.convert('RGB')
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f'{path} cannot be read as an image: {error}') from error


def _cifar(
    name: str, folder: str, data_root: str, split: str, transform: dict, in_memory: bool
) -> ImageClassification:
    """Either layout that is around: class folders, or the archives that torchvision reads."""
    _check_split(split, ('train', 'val'))
    root = Path(data_root)
    if (root / split).is_dir():
        return class_folder(data_root, split, transform, in_memory)
    if not (root / folder).is_dir():
        raise _missing(
            root / folder, f"{root}/{folder}/ (torchvision's) or {root}/{split}/<class name>/*.png"
        )
    reader = getattr(datasets, name)
    source = _read(reader, root / folder, root=data_root, train=split == 'train')
    return ImageClassification(source, source.classes, transform)


@DATASETS.register_module(name='cifar10')
def cifar10(
    data_root: str, split: str, transform: dict, in_memory: bool = False
) -> ImageClassification:
    """CIFAR-10: class folders if `<data_root>/<split>` is one, else torchvision's layout.

    Args:
        data_root: Folder that holds `train` and `val`, or `cifar-10-batches-py`.
        split: 'train' or 'val' (in torchvision's layout the 10,000 test images).
        transform: Config of the transform.
        in_memory: Decode class folders once, at the start; torchvision's layout always is.

    Raises:
        ValueError: The folder is missing or laid out otherwise.
    """
    return _cifar('CIFAR10', 'cifar-10-batches-py', data_root, split, transform, in_memory)


@DATASETS.register_module(name='cifar100')
def cifar100(
    data_root: str, split: str, transform: dict, in_memory: bool = False
) -> ImageClassification:
    """CIFAR-100, in the same two layouts as `cifar10`.

    Args:
        data_root: Folder that holds `train` and `val`, or `cifar-100-python`.
        split: 'train' or 'val' (in torchvision's layout the 10,000 test images).
        transform: Config of the transform.
        in_memory: Decode class folders once, at the start; torchvision's layout always is.

    Raises:
        ValueError: The folder is missing or laid out otherwise.
    """
    return _cifar('CIFAR100', 'cifar-100-python', data_root, split, transform, in_memory)


@DATASETS.register_module(name='stl10')
def stl10(data_root: str, split: str, transform: dict) -> ImageClassification:
    """STL-10: 5,000 labelled training and 8,000 test images of 96x96 pixels.

    Args:
        data_root: Folder that holds `stl10_binary`.
        split: 'train' or 'test'.
        transform: Config of the transform.

    Raises:
        ValueError: The folder is missing or incomplete.
    """
    _check_split(split, ('train', 'test'))
    folder = Path(data_root) / 'stl10_binary'
    if not folder.is_dir():
        raise _missing(
            folder, f'{folder}/{{train,test}}_{{X,y}}.bin, unlabeled_X.bin, class_names.txt'
        )
    source = _read(datasets.STL10, folder, root=data_root, split=split)
    return ImageClassification(source, source.classes, transform)


@DATASETS.register_module(name='svhn')
def svhn(data_root: str, split: str, transform: dict) -> ImageClassification:
    """SVHN, cropped digits: 73,257 training and 26,032 test images of 32x32 pixels.

    Args:
        data_root: Folder that holds `train_32x32.mat` and `test_32x32.mat`.
        split: 'train' or 'test'.
        transform: Config of the transform.

    Raises:
        ValueError: The file is missing or damaged.
    """
    _check_split(split, ('train', 'test'))
    file = Path(data_root) / f'{split}_32x32.mat'
    if not file.is_file():
        raise _missing(file, f'{data_root}/{{train,test}}_32x32.mat')
    source = _read(datasets.SVHN, file, root=data_root, split=split)
    return ImageClassification(source, DIGITS, transform)


def _read(reader: Callable[..., Any], path: Path, **kwargs: Any) -> Any:
    """Calls a torchvision data set, which checks the files' checksums."""
    try:
        return reader(**kwargs)
    except RuntimeError as error:
        raise ValueError(f'{path} is incomplete or damaged ({error}); see docs/data.md') from error


def _check_split(split: str, allowed: tuple[str, ...]) -> None:
    if split not in allowed:
        raise ValueError(f'split={split!r} must be one of {allowed}')


def _missing(path: Path, expected: str) -> ValueError:
    return ValueError(
        f'{path} does not exist; expected {expected}; docs/data.md says how to get it'
    )
