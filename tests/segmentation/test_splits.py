"""What is set aside of the training pairs."""

from itertools import pairwise

import pytest

from vqmoe_vision.engine.cli import load_config
from vqmoe_vision.segmentation.datasets import part_indices

from ..rows import CONFIGS


def test_dev_is_set_aside_of_train_in_runs_of_neighbours() -> None:
    train, dev = part_indices(367, 'train', 60), part_indices(367, 'dev', 60)
    assert sorted(train + dev) == list(range(367)) == part_indices(367, 'all', 0)
    assert len(dev) == 60
    # blocks of 19 or 20: three whole ones and a rest, so at most four runs
    runs = sum(b - a > 1 for a, b in pairwise(dev)) + 1
    assert runs <= 4
    # as in the rows that are checked in: with others their scores would not compare
    assert dev == [*range(40, 80), *range(196, 215), 272]


@pytest.mark.parametrize('dev_size', [0, 10, 11])
def test_a_part_that_would_be_empty(dev_size: int) -> None:
    with pytest.raises(ValueError, match=f'^dev_size={dev_size} .* between 1 and 9'):
        part_indices(10, 'train', dev_size)


def test_an_unknown_part() -> None:
    with pytest.raises(ValueError, match=r"^part='val' "):
        part_indices(10, 'val', 2)


@pytest.mark.parametrize(
    'leaf',
    [
        'ade20k/segmenter_vit-t-vqmoe_mask_8xb1-160k_ade20k-512x512.py',
        'ade20k/segmenter_vit-l-vqmoe_mask_8xb1-160k_ade20k-640x640.py',
        'segmenter_vit-t-vqmoe_mask_8xb2-80k_pascal-context-59-480x480.py',
        'segmenter_vit-t-vqmoe_mask_8xb1-80k_cityscapes-768x768.py',
        'segmenter_vit-t-vqmoe_mask_8xb1-20k_camvid-352x480.py',
        'segmenter_vit-4x128-vqmoe_mask_1xb8-600_camvid-192x192.py',
    ],
)
def test_configs_choose_by_what_training_leaves_out(leaf: str) -> None:
    config = load_config(str(CONFIGS / 'segmentation' / leaf))
    train, val, test = (config[f'{n}_dataloader'].dataset for n in ('train', 'val', 'test'))
    files = ('data_root', 'data_prefix', 'ann_file', 'dev_size')
    assert {k: train.get(k) for k in files} == {k: val.get(k) for k in files}
    assert (train.part, val.part) == ('train', 'dev')
    assert 'part' not in test
    assert (test.data_prefix, test.get('ann_file')) != (val.data_prefix, val.get('ann_file'))
    assert test.pipeline == val.pipeline
