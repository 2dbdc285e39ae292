import math
from base64 import b64decode
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.evaluator import Evaluator
from mmengine.registry import DATASETS
from PIL import Image
from sklearn.datasets import load_digits

from vqmoe_vision.classification import Accuracy, datasets
from vqmoe_vision.classification.datasets import SPLITS, long_tail, split_indices
from vqmoe_vision.classification.evaluation import thirds
from vqmoe_vision.engine.cli import one_line

from .. import refused

ALL = [split for split in SPLITS if split != 'dev']
TO_TENSOR = dict(type='timm', input_size=8, mean=(0.0,) * 3, std=(1.0,) * 3, crop_pct=1.0)


def build(name: str, **kwargs: object) -> Any:
    return DATASETS.build(dict(type=name, transform=TO_TENSOR, **kwargs))


def write_images(folder: Path, count: int = 2) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = np.full((8, 8, 3), 40 * i % 256, np.uint8)
        Image.fromarray(pixels).save(folder / f'{i}.png')


@pytest.mark.parametrize('in_memory', [False, True])
def test_class_folder(tmp_path, in_memory):
    for name in ('dog', 'cat'):
        write_images(tmp_path / 'train' / name, 4)
    folder = dict(data_root=str(tmp_path), in_memory=in_memory)
    dataset = build('class_folder', split='train', **folder)
    assert dataset.metainfo == {'classes': ('cat', 'dog')}
    assert [target for _, target in dataset.source] == [0] * 4 + [1] * 4
    torch.testing.assert_close(dataset[1][0], torch.full((3, 8, 8), 40 / 255))
    (tmp_path / 'train/cat/1.png').write_bytes(b'')
    with pytest.raises(ValueError, match=r'1\.png cannot be read as an image'):
        build('class_folder', split='train', **folder)[1]


FOLDERS = dict(class_folder='train', cifar10='cifar-10-batches-py', cifar100='cifar-100-python')
FOLDERS |= dict(stl10='stl10_binary', svhn='')


@pytest.mark.parametrize('name', FOLDERS)
def test_what_is_missing_or_damaged_names_the_folder_and_the_page(name, tmp_path):
    def said() -> str:
        with pytest.raises(ValueError, match=r'docs/how-to/data\.md') as caught:
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
def test_an_impossible_split(name):
    no_dev = 'x/dev' if name == 'class_folder' else 'dev_size'  # it is the folder 'dev' then
    for field, split, dev_size in (
        ('dev_size', 'dev', -1),
        ('dev_size', 'train', None),
        (no_dev, 'dev', 0),
        ('split', 'eval', 1),
    ):
        refused(f'^{field}[= ]', build, name, split=split, data_root='x', dev_size=dev_size)
    refused(r'^split=', build, 'digits', split='eval')


@pytest.mark.parametrize('name', ['cifar10', 'cifar100'])
def test_cifar_as_class_folders(tmp_path, name):
    for part, count in (('train', 6), ('val', 3)):
        for animal in ('cat', 'dog'):
            write_images(tmp_path / part / animal, count)
    sizes = {s: len(build(name, data_root=str(tmp_path), split=s, dev_size=4)) for s in SPLITS}
    assert sizes == {'train': 8, 'dev': 4, 'trainval': 12, 'test': 6}
    without = {s: len(build(name, data_root=str(tmp_path), split=s, dev_size=0)) for s in ALL}
    assert without == {'train': 12, 'trainval': 12, 'test': 6}
    write_images(tmp_path / 'test' / 'cat', 1)
    for dev_size in (0, 5000):
        assert len(build(name, data_root=str(tmp_path), split='test', dev_size=dev_size)) == 1


def test_dev_is_held_out_of_train_and_always_the_same():
    targets = [0] * 60 + [1] * 30
    train, dev = (split_indices(targets, split, 9) for split in ('train', 'dev'))
    assert sorted(train + dev) == list(range(90))
    assert sum(index < 60 for index in dev) == 6  # two of three, as among all
    # as ever: another dev would have chosen other checkpoints
    assert dev == [0, 3, 44, 47, 53, 55, 64, 65, 81]
    assert split_indices(targets, 'trainval', 9) == list(range(90))


def test_a_dev_that_is_too_small_or_too_large():
    for size in (1, 89, 90):
        said = f'dev_size={size} is not possible with 90'
        refused(said, split_indices, [0, 1] * 45, 'dev', size)


def test_wrappers_of_data_sets_are_refused():
    inner = dict(type='digits', split='dev', transform=TO_TENSOR)
    for wrapper in (
        dict(type='RepeatDataset', times=2, dataset=inner),
        dict(type='ConcatDataset', datasets=[inner]),
    ):
        with pytest.raises(ValueError) as caught:
            DATASETS.build(wrapper)
        said = one_line(caught.value)
        assert said.startswith('dataset.type is a wrapper of data sets, and those')


def counts_of(dataset: Any) -> list[int]:
    return np.bincount([target for _, target in dataset]).tolist()


def test_cifar10_lt_has_the_published_sizes():
    # 5000 * 100^(-c / 9), rounded down, as LDAM-DRW's IMBALANCECIFAR10: 12,406 images
    targets = np.arange(50_000) % 10
    kept = targets[long_tail(targets, 100)]
    expected = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert np.bincount(kept).tolist() == expected and len(kept) == 12_406


def test_the_images_that_are_kept_are_always_the_same_and_drawn():
    targets = np.arange(3000) % 3
    np.random.seed(1)
    first = long_tail(targets, 10)
    np.random.seed(2)
    assert np.array_equal(first, long_tail(targets.tolist(), 10))
    assert np.array_equal(first, np.sort(first))
    kept = [0, 1, 3, 6, 7, 9, 10, 12, 14, 15, 17, 18, 19, 21, 24, 27, 28]
    assert long_tail([0, 1, 2] * 10, 4).tolist() == kept  # as ever
    assert set(first) < set(long_tail(targets, 5))
    # not the first of a folder: the last class keeps 100 of 1000, whose mean is 1500 +- 82
    assert abs(first[targets[first] == 2].mean() - 1500) < 330


def test_an_impossible_imbalance():
    for imbalance in (0.5, math.nan, math.inf, 'x', True, 100):  # of 100 a class would keep none
        refused(r'^imbalance=', long_tail, [0, 1, 2] * 9, imbalance)


def test_dev_is_that_of_the_whole_and_train_a_part():
    targets = [0, 1, 2] * 100
    dev = split_indices(targets, 'dev', 30, 10)
    assert dev == split_indices(targets, 'dev', 30)
    train = split_indices(targets, 'train', 30, 10)
    # 90 of each are left: 90 * (1, 0.316, 0.1)
    assert np.bincount(np.array(targets)[train]).tolist() == [90, 28, 9]
    assert set(train) < set(split_indices(targets, 'train', 30))
    both = split_indices(targets, 'trainval', 30, 10)
    assert np.bincount(np.array(targets)[both]).tolist() == [100, 31, 10]


@pytest.mark.parametrize('in_memory', [False, True])
@pytest.mark.parametrize('dev_size', [0, 6])
def test_class_folders(tmp_path, in_memory, dev_size):
    for part, count in (('train', 10), ('test', 4)):
        for name in ('ant', 'bee', 'cat'):
            write_images(tmp_path / part / name, count)
    # 10, or 8 without dev, times (1, 1/2, 1/4)
    long, dev = ([10, 5, 2], []) if dev_size == 0 else ([8, 4, 2], [2, 2, 2])
    sizes = {'train': long, 'test': [4, 4, 4]}
    sizes |= {'dev': dev, 'trainval': [10, 5, 2]} if dev else {}
    for split, expected in sizes.items():
        options = dict(in_memory=in_memory, dev_size=dev_size, imbalance=4)
        dataset = datasets.class_folder(str(tmp_path), split, TO_TENSOR, **options)
        assert counts_of(dataset) == expected
        assert dataset.metainfo['train_counts'] == tuple(long)


class Archive(list):
    """What torchvision reads of an archive: pairs, and all targets."""

    def __init__(self, root: str, split: str) -> None:
        targets = [0, 1, 2] * (10 if split == 'train' else 4)
        super().__init__((Image.new('RGB', (8, 8)), target) for target in targets)
        self.targets, self.classes = targets, ['ant', 'bee', 'cat']


@pytest.mark.parametrize('split', SPLITS)
def test_archives(split):
    arguments = Archive, '.', 'archive', split, TO_TENSOR, 6
    dataset = datasets._part(*arguments, imbalance=4)
    expected = {'train': [8, 4, 2], 'dev': [2] * 3, 'trainval': [10, 5, 2], 'test': [4] * 3}
    assert counts_of(dataset) == expected[split]
    assert dataset.metainfo == {'classes': ('ant', 'bee', 'cat'), 'train_counts': (8, 4, 2)}
    assert 'train_counts' not in datasets._part(*arguments, imbalance=1).metainfo


def test_thirds_of_classes_by_frequency():
    assert thirds([10, 50, 30, 20, 40]) == {'head': [1, 4], 'medium': [2], 'tail': [3, 0]}
    parts = thirds(range(10, 0, -1))
    assert parts == {'head': [0, 1, 2], 'medium': [3, 4, 5, 6], 'tail': [7, 8, 9]}
    assert [len(part) for part in thirds([1] * 100).values()] == [33, 34, 33]
    assert thirds([5, 9]) == {'head': [1], 'medium': [], 'tail': [0]}


def test_accuracies_by_frequency_by_hand():
    # from the most frequent in training on: class 2 has 2 of 2 images right, class 0 has 1 of 4,
    # class 1 has 0 of 1
    targets = torch.tensor([0, 0, 0, 0, 1, 2, 2])
    chosen = torch.tensor([0, 1, 1, 2, 0, 2, 2])
    evaluator = Evaluator(dict(type='Accuracy', topk=(3,)))
    evaluator.dataset_meta = {'train_counts': (20, 10, 30)}
    logits = torch.nn.functional.one_hot(chosen, 3).float()
    evaluator.process(data_samples=list(logits), data_batch=[None, targets])
    found = evaluator.evaluate(7)
    assert found == {
        'accuracy/top3': 100.0,  # the others are of the best one, whatever k is
        'accuracy/balanced': pytest.approx((25 + 0 + 100) / 3),
        'accuracy/head': 100.0,
        'accuracy/medium': 25.0,
        'accuracy/tail': 0.0,
    }


def test_accuracy_by_hand():
    metric = Accuracy(topk=(1, 2))
    logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    metric.process([None, torch.tensor([0, 1, 2, 2])], list(logits))
    # first choices: right, wrong, wrong, right; among two: right, right, wrong, right
    assert metric.evaluate(4) == {'accuracy/top1': 50.0, 'accuracy/top2': 75.0}
    right = np.unpackbits(np.frombuffer(b64decode(metric.correct), np.uint8), count=4)
    assert right.tolist() == [1, 0, 0, 1]
    # more best logits than classes, and an image that only pads the last batch
    metric = Accuracy(topk=(1, 5))
    metric.process([None, torch.tensor([0, 1, 0])], [torch.tensor([2.0, 1.0])] * 3)
    assert metric.evaluate(2) == {'accuracy/top1': 50.0, 'accuracy/top5': 100.0}


def test_digits_splits_share_no_scan_and_keep_the_classes_in_proportion() -> None:
    parts = [build('digits', split=split) for split in ('train', 'dev', 'test')]
    assert [len(part) for part in parts] == [1257, 180, 360]
    scans = [np.asarray(image).tobytes() for part in parts for image, _ in part.source]
    original = load_digits().images
    assert len(set(scans)) == len(np.unique(original.reshape(len(original), -1), axis=0))
    counts = np.bincount([target for _, target in parts[2].source])
    assert counts.min() >= 34 and counts.max() <= 37
