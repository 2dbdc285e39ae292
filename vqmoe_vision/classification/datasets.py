"""Data sets by name, for configs: images and class indices, through torchvision.

A config's dataset is `dict(type='cifar10', data_root=..., split=..., transform=dict(...))`. Nothing
is downloaded here; docs/data.md says how each folder is made.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmengine.registry import DATASETS, TRANSFORMS
from PIL import Image
from torch.utils.data import Dataset, Subset
from torchvision import datasets

from vqmoe_vision.engine.digits import DIGITS, digit_scans
from vqmoe_vision.engine.images import opened, read_rgb
from vqmoe_vision.engine.seeding import seed_sample
from vqmoe_vision.models.normalization import Normalization

from .splits import check_split, split_indices
from .transforms import normalization_of, normalized_as


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
        self._config = transform
        self.transform: Callable = TRANSFORMS.build(transform)

    def normalize_as(self, weights: Normalization, field: str) -> None:
        """Lets the transform normalise images as the weights want it, if its config leaves it open.

        Args:
            weights: How images were normalised for them.
            field: Of the config, for messages.

        Raises:
            ValueError: The config of the transform states otherwise.
        """
        found = self.normalization
        if found is not None and found.differing(weights):
            self.transform = normalized_as(self._config, weights, field)

    @property
    def normalization(self) -> Normalization | None:
        """How the transform normalises images; None if it does not as torchvision does."""
        return normalization_of(self.transform)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        seed_sample(index)
        image, target = self.source[index]
        return self.transform(image.convert('RGB')), int(target)


@DATASETS.register_module(name='digits')
def digits(split: str, transform: dict) -> ImageClassification:
    """scikit-learn's 1,797 scans of handwritten digits, 8x8 pixels; comes with scikit-learn.

    Args:
        split: 'train' (1,257 images), 'dev' (180 images) or 'test' (360 images).
        transform: Config of the transform.

    Raises:
        ValueError: There is no such split.
    """
    scans, targets = digit_scans(split)
    pairs = [(Image.fromarray(scan), target) for scan, target in zip(scans, targets, strict=True)]
    return ImageClassification(pairs, DIGITS, transform)


@DATASETS.register_module(name='class_folder')
def class_folder(
    data_root: str, split: str, transform: dict, in_memory: bool = False, dev_size: int = 0
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

    Raises:
        ValueError: The folder is missing or laid out otherwise, an image cannot be read, or there
            is no such split.
    """
    folder = Path(data_root) / split
    if dev_size:
        check_split(split)
        test = 'test' if (Path(data_root) / 'test').is_dir() else 'val'
        folder = Path(data_root) / (test if split == 'test' else 'train')
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
    if dev_size and split != 'test':
        chosen = split_indices(source.targets, split, dev_size)
        source.samples = [source.samples[i] for i in chosen]
    if in_memory:
        source = [(load_image(path), target) for path, target in source.samples]
    return ImageClassification(source, classes, transform)


def load_image(path: str) -> Image.Image:
    """Reads an image file as RGB, the way it is meant to be seen.

    Args:
        path: The file.

    Raises:
        ValueError: The file is not an image, is damaged or too large, or its pixels have no
            meaning here, see `read_rgb`.
    """
    with opened(path, path) as image:
        return read_rgb(image, path)


def _cifar(
    name: str, folder: str, root: Path, split: str, transform: dict, **options: Any
) -> ImageClassification:
    """Either layout that is around: class folders, or the archives that torchvision reads."""
    check_split(split)
    if any((root / part).is_dir() for part in ('train', 'val', 'test')):
        return class_folder(str(root), split, transform, **options)
    if not (root / folder).is_dir():
        raise _missing(
            root / folder, f"{root}/{folder}/ (torchvision's) or {root}/train/<class name>/*.png"
        )
    reader = getattr(datasets, name)
    source = _read(reader, root / folder, root=str(root), train=split != 'test')
    return _part(source, source.targets, source.classes, split, transform, options['dev_size'])


def _part(
    source: Any,
    targets: Sequence[int],
    classes: Sequence[str],
    split: str,
    transform: dict,
    dev_size: int,
) -> ImageClassification:
    """A split of the training images, or all of the test images."""
    if split != 'test':
        source = Subset(source, split_indices(targets, split, dev_size))
    return ImageClassification(source, classes, transform)


@DATASETS.register_module(name='cifar10')
def cifar10(
    data_root: str, split: str, transform: dict, in_memory: bool = False, dev_size: int = 5000
) -> ImageClassification:
    """CIFAR-10: class folders if there are some, else torchvision's layout.

    Args:
        data_root: Folder that holds `train` and `test` or `val`, or `cifar-10-batches-py`.
        split: One of `splits.SPLITS`.
        transform: Config of the transform.
        in_memory: Decode class folders once, at the start; torchvision's layout always is.
        dev_size: Training images that are set aside as 'dev'.

    Raises:
        ValueError: The folder is missing or laid out otherwise.
    """
    options = {'in_memory': in_memory, 'dev_size': dev_size}
    return _cifar('CIFAR10', 'cifar-10-batches-py', Path(data_root), split, transform, **options)


@DATASETS.register_module(name='cifar100')
def cifar100(
    data_root: str, split: str, transform: dict, in_memory: bool = False, dev_size: int = 5000
) -> ImageClassification:
    """CIFAR-100, in the same two layouts as `cifar10`.

    Args:
        data_root: Folder that holds `train` and `test` or `val`, or `cifar-100-python`.
        split: One of `splits.SPLITS`.
        transform: Config of the transform.
        in_memory: Decode class folders once, at the start; torchvision's layout always is.
        dev_size: Training images that are set aside as 'dev'.

    Raises:
        ValueError: The folder is missing or laid out otherwise.
    """
    options = {'in_memory': in_memory, 'dev_size': dev_size}
    return _cifar('CIFAR100', 'cifar-100-python', Path(data_root), split, transform, **options)


@DATASETS.register_module(name='stl10')
def stl10(data_root: str, split: str, transform: dict, dev_size: int = 500) -> ImageClassification:
    """STL-10: 5,000 labelled training and 8,000 test images of 96x96 pixels.

    Args:
        data_root: Folder that holds `stl10_binary`.
        split: One of `splits.SPLITS`.
        transform: Config of the transform.
        dev_size: Training images that are set aside as 'dev'.

    Raises:
        ValueError: The folder is missing or incomplete.
    """
    check_split(split)
    part = 'test' if split == 'test' else 'train'
    folder = Path(data_root) / 'stl10_binary'
    if not folder.is_dir():
        raise _missing(
            folder, f'{folder}/{{train,test}}_{{X,y}}.bin, unlabeled_X.bin, class_names.txt'
        )
    source = _read(datasets.STL10, folder, root=data_root, split=part)
    return _part(source, source.labels, source.classes, split, transform, dev_size)


@DATASETS.register_module(name='svhn')
def svhn(data_root: str, split: str, transform: dict, dev_size: int = 5000) -> ImageClassification:
    """SVHN, cropped digits: 73,257 training and 26,032 test images of 32x32 pixels.

    Args:
        data_root: Folder that holds `train_32x32.mat` and `test_32x32.mat`.
        split: One of `splits.SPLITS`.
        transform: Config of the transform.
        dev_size: Training images that are set aside as 'dev'.

    Raises:
        ValueError: The file is missing or damaged.
    """
    check_split(split)
    part = 'test' if split == 'test' else 'train'
    file = Path(data_root) / f'{part}_32x32.mat'
    if not file.is_file():
        raise _missing(file, f'{data_root}/{{train,test}}_32x32.mat')
    source = _read(datasets.SVHN, file, root=data_root, split=part)
    return _part(source, source.labels, DIGITS, split, transform, dev_size)


def _read(reader: Callable[..., Any], path: Path, **kwargs: Any) -> Any:
    """Calls a torchvision data set, which checks the files' checksums."""
    try:
        return reader(**kwargs)
    except RuntimeError as error:
        raise ValueError(f'{path} is incomplete or damaged ({error}); see docs/data.md') from error


def _missing(path: Path, expected: str) -> ValueError:
    return ValueError(
        f'{path} does not exist; expected {expected}; docs/data.md says how to get it'
    )
