"""Training and validation part the same images alike, or are refused."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import ConcatDataset

from vqmoe_vision.classification.datasets import ImageClassification, class_folder
from vqmoe_vision.engine import cli
from vqmoe_vision.engine.training_data import _check_held_out
from vqmoe_vision.segmentation.datasets import CheckedDataset

from ..classification.test_own_data import write_config
from ..segmentation.conftest import write_pair

TRANSFORM = dict(type='timm', input_size=8, mean=[0.5] * 3, std=[0.5] * 3)


def classes(root: Path, part: str, dev_size: int) -> ImageClassification:
    for name in ('cat', 'dog'):
        for number in range(10):
            path = root / 'train' / name / f'{number}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (8, 8)).save(path)
    return class_folder(str(root), part, TRANSFORM, dev_size=dev_size)


def pairs(root: Path, part: str, dev_size: int) -> CheckedDataset:
    for number in range(20):
        write_pair(root, f'images/{number}.jpg', f'masks/{number}.png', np.zeros((8, 8)))
    return CheckedDataset(
        metainfo=dict(classes=('all',), palette=[[0, 0, 0]]),
        part=part,
        dev_size=dev_size,
        data_root=str(root),
        data_prefix=dict(img_path='images', seg_map_path='masks'),
        pipeline=[],
    )


BOTH = pytest.mark.parametrize('make', [classes, pairs])


def runner_of(train: Any, val: Any) -> Any:
    loaders = {'train_dataloader': train, 'val_dataloader': val}
    loaders = {name: SimpleNamespace(dataset=dataset) for name, dataset in loaders.items()}
    return SimpleNamespace(cfg=loaders, **loaders)


@BOTH
@pytest.mark.parametrize(('train', 'val'), [(('train', 3), ('dev', 8)), (('dev', 3), ('train', 8))])
def test_another_size_is_refused(
    make: Callable[..., Any], train: tuple[str, int], val: tuple[str, int], tmp_path: Path
) -> None:
    # the same folder, however it is written
    seen, held_out = make(tmp_path, *train), make(tmp_path / '..' / tmp_path.name, *val)
    message = (
        'val_dataloader.dataset.dev_size=8 is not possible: train_dataloader.dataset has '
        'dev_size=3 of the same images'
    )
    for wrapped in (seen, ConcatDataset([make(tmp_path / 'other', *train), seen])):
        with pytest.raises(ValueError, match=f'^{re.escape(message)}'):
            _check_held_out(runner_of(wrapped, held_out))


@BOTH
def test_what_shares_no_image_or_means_to(make: Callable[..., Any], tmp_path: Path) -> None:
    everything = 'trainval' if make is classes else 'all'
    dev = make(tmp_path, 'dev', 8)
    for train in (
        make(tmp_path, 'train', 8),
        make(tmp_path, everything, 3),
        make(tmp_path / 'other', 'train', 3),
    ):
        _check_held_out(runner_of(train, dev))


def test_a_training_that_leaves_out_nothing(tmp_path: Path) -> None:
    seen = classes(tmp_path, 'train', 0)
    assert len(seen) == 20
    with pytest.raises(ValueError, match=r'train_dataloader\.dataset has dev_size=0'):
        _check_held_out(runner_of(seen, classes(tmp_path, 'dev', 8)))


def test_a_training_is_refused_before_it_begins(tmp_path: Path) -> None:
    names = ('cat', 'dog', 'owl')
    config = write_config(tmp_path, dict(train=names, val=names))
    options = ['val_dataloader.dataset.split=dev', 'val_dataloader.dataset.dev_size=3']
    with pytest.raises(SystemExit, match=r'^error: val_dataloader\.dataset\.dev_size=3') as caught:
        cli.train([config, '--work-dir', str(tmp_path / 'w'), '--cfg-options', *options])
    assert '\n' not in str(caught.value)
