"""Images in a folder per class, and image files as classification sees them."""

from pathlib import Path
from typing import Any

from mmengine.registry import DATASETS
from PIL import Image
from torchvision import datasets

from vqmoe_vision.engine.images import opened, read_rgb
from vqmoe_vision.engine.training_data import TrainingPart

from .image_classification import ImageClassification
from .splits import check_split, split_indices, train_counts


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
        imbalance: Largest class over smallest in 'train' and 'trainval', as `splits.long_tail`.

    Raises:
        ValueError: The folder is missing or laid out otherwise, an image cannot be read, or there
            is no such split or no such imbalance.
    """
    root = Path(data_root)
    folder, train = root / split, root / 'train'
    if dev_size != 0:
        check_split(split, dev_size)
        folder = root / folder_of(split, root)
    source: Any = _image_folder(folder)
    classes, counts, part = source.classes, None, None
    if imbalance != 1:
        targets = source.targets if folder == train else _image_folder(train).targets
        counts = train_counts(targets, dev_size, imbalance)
    if folder == train:
        named = split if dev_size else 'train'  # a path may say that in other ways
        part = TrainingPart((str(train.resolve()),), named, dev_size)
        chosen = split_indices(source.targets, named, dev_size, imbalance)
        source.samples = [source.samples[i] for i in chosen]
    start = len(f'{folder}/')  # a `Path` of each would take seconds of ImageNet
    names = [path[start:] for path, _ in source.samples]
    if in_memory:
        source = [(load_image(path), target) for path, target in source.samples]
    return ImageClassification(source, classes, transform, counts, names, part)


def folder_of(split: str, root: Path) -> str:
    """The folder that holds the images of a part."""
    if split != 'test':
        return 'train'
    return 'test' if (root / 'test').is_dir() else 'val'


def _image_folder(folder: Path) -> datasets.ImageFolder:
    expected = f'{folder}/<class name>/<image>.jpg (or .png, ...)'
    if not folder.is_dir():
        raise missing(folder, expected)
    try:
        return datasets.ImageFolder(str(folder), loader=load_image)
    except FileNotFoundError as error:  # no class folder, or one without an image
        raise ValueError(
            f'{folder} is not laid out as {expected}: {str(error).rstrip(". ")}; see docs/data.md'
        ) from error


def load_image(path: str) -> Image.Image:
    """Reads an image file as RGB, the way it is meant to be seen."""
    with opened(path, path) as image:
        return read_rgb(image, path)


def missing(path: Path, expected: str) -> ValueError:
    """What is raised where a data set is not."""
    return ValueError(
        f'{path} does not exist; expected {expected}; docs/data.md says how to get it'
    )
