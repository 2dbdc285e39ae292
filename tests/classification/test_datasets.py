from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import DATASETS
from PIL import Image
from sklearn.datasets import load_digits

from vqmoe_vision.classification.datasets import ImageClassification
from vqmoe_vision.classification.splits import SPLITS, split_indices
from vqmoe_vision.engine.command import one_line

ALL = [split for split in SPLITS if split != 'dev']
TO_TENSOR = dict(type='timm', input_size=8, mean=(0.0,) * 3, std=(1.0,) * 3, crop_pct=1.0)


def build(name: str, **kwargs: object) -> ImageClassification:
    return DATASETS.build(dict(type=name, transform=TO_TENSOR, **kwargs))


def write_images(folder: Path, count: int = 2) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = np.full((8, 8, 3), 40 * i, np.uint8)
        Image.fromarray(pixels).save(folder / f'{i}.png')


def test_digits_splits_share_no_scan_and_keep_the_classes_in_proportion() -> None:
    parts = [build('digits', split=split) for split in ('train', 'dev', 'test')]
    assert [len(part) for part in parts] == [1257, 180, 360]
    scans = [np.asarray(image).tobytes() for part in parts for image, _ in part.source]
    original = load_digits().images
    assert len(set(scans)) == len(np.unique(original.reshape(len(original), -1), axis=0))
    counts = np.bincount([target for _, target in parts[2].source])
    assert counts.min() >= 34 and counts.max() <= 37


def test_digits_are_rgb_tensors() -> None:
    image, target = build('digits', split='dev')[0]
    assert image.shape == (3, 8, 8) and image.dtype == torch.float32
    assert torch.equal(image[0], image[2])
    assert isinstance(target, int)


@pytest.mark.parametrize('in_memory', [False, True])
def test_class_folder(tmp_path: Path, in_memory: bool) -> None:
    for name in ('dog', 'cat'):
        write_images(tmp_path / 'train' / name)
    dataset = build('class_folder', data_root=str(tmp_path), split='train', in_memory=in_memory)
    assert dataset.metainfo == {'classes': ('cat', 'dog')}
    assert [target for _, target in dataset] == [0, 0, 1, 1] if in_memory else len(dataset) == 4
    torch.testing.assert_close(dataset[1][0], torch.full((3, 8, 8), 40 / 255))


@pytest.mark.parametrize('name', ['cifar10', 'cifar100'])
def test_cifar_as_class_folders(tmp_path: Path, name: str) -> None:
    for part, count in (('train', 6), ('val', 3)):
        for animal in ('cat', 'dog'):
            write_images(tmp_path / part / animal, count)
    sizes = {}
    for split in SPLITS:
        sizes[split] = len(build(name, data_root=str(tmp_path), split=split, dev_size=4))
    assert sizes == {'train': 8, 'dev': 4, 'trainval': 12, 'test': 6}
    without = {s: len(build(name, data_root=str(tmp_path), split=s, dev_size=0)) for s in ALL}
    assert without == {'train': 12, 'trainval': 12, 'test': 6}
    write_images(tmp_path / 'test' / 'cat', 1)
    for dev_size in (0, 5000):
        assert len(build(name, data_root=str(tmp_path), split='test', dev_size=dev_size)) == 1


def test_dev_is_held_out_of_train_and_always_the_same() -> None:
    targets = [0] * 60 + [1] * 30
    train, dev = (split_indices(targets, split, 9) for split in ('train', 'dev'))
    assert sorted(train + dev) == list(range(90))
    assert sum(index < 60 for index in dev) == 6  # two of three, as among all
    # as ever: another dev would have chosen other checkpoints
    assert dev == [0, 3, 44, 47, 53, 55, 64, 65, 81]
    assert split_indices(targets, 'trainval', 9) == list(range(90))


@pytest.mark.parametrize('dev_size', [1, 89, 90])
def test_a_dev_that_is_too_small_or_too_large(dev_size: int) -> None:
    with pytest.raises(ValueError, match=f'dev_size={dev_size} is not possible with 90'):
        split_indices([0, 1] * 45, 'dev', dev_size)


def test_a_training_that_leaves_nothing_to_dev() -> None:
    assert split_indices([0, 1] * 45, 'train', 0) == list(range(90))


@pytest.mark.parametrize('name', ['class_folder', 'cifar10', 'cifar100', 'stl10', 'svhn'])
@pytest.mark.parametrize(
    ('split', 'dev_size', 'allowed'),
    [
        ('dev', -1, "at least 1 with split='dev'"),
        ('train', -1, "at least 0 with split='train'"),
        ('train', 0.1, 'int is expected'),
        ('train', None, 'int is expected'),
        ('dev', 0, "at least 1 with split='dev'"),
    ],
)
def test_an_impossible_dev_size(name: str, split: str, dev_size: object, allowed: str) -> None:
    if (name, dev_size) == ('class_folder', 0):
        allowed = r'expected x/dev/<class name>'  # it is the folder 'dev' then
    with pytest.raises(ValueError, match=allowed):
        build(name, data_root='x', split=split, dev_size=dev_size)


@pytest.mark.parametrize('in_memory', [False, True])
def test_a_part_of_a_class_folder_reads_its_own_images_only(
    tmp_path: Path, in_memory: bool
) -> None:
    for animal in ('cat', 'dog'):
        write_images(tmp_path / 'train' / animal, 4)
    folder = dict(data_root=str(tmp_path), dev_size=2, in_memory=in_memory)
    parts = [build('class_folder', split=split, **folder) for split in ('train', 'dev')]
    assert [sorted(part[i][1] for i in range(len(part))) for part in parts] == [
        [0, 0, 0, 1, 1, 1],
        [0, 1],
    ]


@pytest.mark.parametrize(
    ('name', 'split', 'expected'),
    [
        ('class_folder', 'train', 'train/<class name>/<image>.jpg'),
        ('cifar10', 'train', 'cifar-10-batches-py'),
        ('cifar100', 'test', 'cifar-100-python'),
        ('stl10', 'train', 'stl10_binary'),
        ('svhn', 'test', 'test_32x32.mat'),
    ],
)
def test_missing_data_set_names_folder_layout_and_help(
    tmp_path: Path, name: str, split: str, expected: str
) -> None:
    with pytest.raises(ValueError) as caught:
        build(name, data_root=str(tmp_path), split=split)
    message = str(caught.value)
    assert str(tmp_path) in message and expected in message and 'docs/data.md' in message


def test_class_folder_with_images_in_the_wrong_place(tmp_path: Path) -> None:
    write_images(tmp_path / 'train')
    with pytest.raises(ValueError, match=r'is not laid out as .*<class name>'):
        build('class_folder', data_root=str(tmp_path), split='train')


def test_a_class_without_an_image_that_is_read(tmp_path: Path) -> None:
    (tmp_path / 'train' / 'cat').mkdir(parents=True)
    (tmp_path / 'train' / 'cat' / 'a.gif').touch()
    message = r'for the classes cat.*\.webp; see docs/data\.md$'
    with pytest.raises(ValueError, match=message):
        build('class_folder', data_root=str(tmp_path), split='train')


@pytest.mark.parametrize(
    ('name', 'folder', 'split'),
    [
        ('cifar10', 'cifar-10-batches-py', 'train'),
        ('cifar100', 'cifar-100-python', 'test'),
        ('stl10', 'stl10_binary', 'test'),
    ],
)
def test_incomplete_data_set(tmp_path: Path, name: str, folder: str, split: str) -> None:
    (tmp_path / folder).mkdir()
    with pytest.raises(ValueError, match=f'{folder} is incomplete or damaged'):
        build(name, data_root=str(tmp_path), split=split)


def test_damaged_svhn(tmp_path: Path) -> None:
    (tmp_path / 'train_32x32.mat').write_bytes(b'no matrix')
    with pytest.raises(ValueError, match=r'train_32x32\.mat is incomplete or damaged'):
        build('svhn', data_root=str(tmp_path), split='train')


@pytest.mark.parametrize(
    'wrapper',
    [
        dict(type='RepeatDataset', times=2),
        dict(type='ClassBalancedDataset', oversample_thr=0.1),
        dict(type='ConcatDataset'),
    ],
)
def test_wrappers_of_data_sets_are_refused(wrapper: dict) -> None:
    inner = dict(type='digits', split='dev', transform=TO_TENSOR)
    several = wrapper['type'] == 'ConcatDataset'
    with pytest.raises(ValueError) as caught:
        DATASETS.build(wrapper | (dict(datasets=[inner]) if several else dict(dataset=inner)))
    assert one_line(caught.value).startswith('dataset.type is a wrapper of data sets, and those')


@pytest.mark.parametrize('in_memory', [False, True])
@pytest.mark.parametrize('kept', [0, 20, 300])
def test_corrupt_image_is_named(tmp_path: Path, in_memory: bool, kept: int) -> None:
    write_images(tmp_path / 'val' / 'cat')
    broken = tmp_path / 'val' / 'cat' / '1.png'
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(noise).save(broken)  # noise does not compress: 768 bytes and a header
    broken.write_bytes(broken.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r'1\.png cannot be read as an image'):
        build('class_folder', data_root=str(tmp_path), split='val', in_memory=in_memory)[1]


@pytest.mark.parametrize('name', ['digits', 'cifar10', 'cifar100', 'stl10', 'svhn'])
def test_unknown_split(name: str) -> None:
    root = {} if name == 'digits' else {'data_root': 'x'}
    with pytest.raises(ValueError, match="split='eval' must be one of"):
        build(name, split='eval', **root)
