from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import DATASETS
from PIL import Image
from sklearn.datasets import load_digits

from vqmoe_vision.classification.datasets import SPLITS, ImageClassification, split_indices
from vqmoe_vision.engine.cli import one_line

ALL = [split for split in SPLITS if split != 'dev']
TO_TENSOR = dict(type='timm', input_size=8, mean=(0.0,) * 3, std=(1.0,) * 3, crop_pct=1.0)


def build(name: str, **kwargs: object) -> ImageClassification:
    return DATASETS.build(dict(type=name, transform=TO_TENSOR, **kwargs))


def write_images(folder: Path, count: int = 2) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = np.full((8, 8, 3), 40 * i, np.uint8)
        Image.fromarray(pixels).save(folder / f'{i}.png')


@pytest.mark.parametrize('in_memory', [False, True])
def test_class_folder(tmp_path: Path, in_memory: bool) -> None:
    for name in ('dog', 'cat'):
        write_images(tmp_path / 'train' / name, 4)
    folder = dict(data_root=str(tmp_path), in_memory=in_memory)
    dataset = build('class_folder', split='train', **folder)
    assert dataset.metainfo == {'classes': ('cat', 'dog')}
    assert [target for _, target in dataset.source] == [0] * 4 + [1] * 4
    torch.testing.assert_close(dataset[1][0], torch.full((3, 8, 8), 40 / 255))
    parts = [build('class_folder', split=s, dev_size=2, **folder) for s in ('train', 'dev')]
    targets = [sorted(part[i][1] for i in range(len(part))) for part in parts]
    assert targets == [[0, 0, 0, 1, 1, 1], [0, 1]]


FOLDERS = {
    'class_folder': 'train',
    'cifar10': 'cifar-10-batches-py',
    'cifar100': 'cifar-100-python',
    'stl10': 'stl10_binary',
    'svhn': '',
}


@pytest.mark.parametrize('name', FOLDERS)
def test_what_is_missing_or_damaged_names_the_folder_and_the_page(
    name: str, tmp_path: Path
) -> None:
    def said() -> str:
        with pytest.raises(ValueError, match=r'docs/data\.md') as caught:
            build(name, data_root=str(tmp_path), split='train')
        return str(caught.value)

    folder = tmp_path / FOLDERS[name]
    assert str(folder) in said()
    folder.mkdir(exist_ok=True)
    (folder / 'train_32x32.mat').write_bytes(b'no matrix')
    write_images(tmp_path / 'b')
    assert str(folder) in said()
    (folder / 'a.gif').touch()
    assert str(folder) in said()


@pytest.mark.parametrize('name', FOLDERS)
def test_an_impossible_split(name: str) -> None:
    for split, dev_size in (('dev', -1), ('train', 0.1), ('train', None), ('dev', 0), ('eval', 1)):
        field = 'split' if split == 'eval' else 'dev_size'
        if (name, dev_size) == ('class_folder', 0):
            field = 'x/dev'  # it is the folder 'dev' then
        with pytest.raises(ValueError, match=f'^{field}[= ]'):
            build(name, split=split, data_root='x', dev_size=dev_size)
    with pytest.raises(ValueError, match=r'^split='):
        build('digits', split='eval')


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
def test_corrupt_image_is_named(tmp_path: Path, in_memory: bool) -> None:
    write_images(tmp_path / 'val' / 'cat')
    (tmp_path / 'val' / 'cat' / '1.png').write_bytes(b'')
    with pytest.raises(ValueError, match=r'1\.png cannot be read as an image'):
        build('class_folder', data_root=str(tmp_path), split='val', in_memory=in_memory)[1]


def test_digits_splits_share_no_scan_and_keep_the_classes_in_proportion() -> None:
    parts = [build('digits', split=split) for split in ('train', 'dev', 'test')]
    assert [len(part) for part in parts] == [1257, 180, 360]
    scans = [np.asarray(image).tobytes() for part in parts for image, _ in part.source]
    original = load_digits().images
    assert len(set(scans)) == len(np.unique(original.reshape(len(original), -1), axis=0))
    counts = np.bincount([target for _, target in parts[2].source])
    assert counts.min() >= 34 and counts.max() <= 37
