import pickle
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from mmseg.registry import DATASETS

from vqmoe_vision.segmentation.datasets import ADE20K, CamVid, DigitScenes, part_indices

from .conftest import write_pair


def scenes(split: str = 'train', **kwargs: int) -> DigitScenes:
    return DigitScenes(split=split, **{'num_scenes': 8, 'size': 64, **kwargs}, pipeline=[])


def test_scene_depends_on_index_split_and_seed_only():
    first, again = scenes(), pickle.loads(pickle.dumps(scenes()))
    assert (first[3]['img'] == again[3]['img']).all()
    assert (first[3]['gt_seg_map'] == again[3]['gt_seg_map']).all()
    assert (first[3]['img'] != first[4]['img']).any()
    assert (first[3]['img'] != scenes('dev')[3]['img']).any()
    assert (first[3]['img'] != scenes(seed=1)[3]['img']).any()


def test_scene_is_an_image_with_a_label_map():
    counts = np.zeros(256, int)
    data = scenes(num_scenes=60, size=96)
    for index in range(len(data)):
        image, labels = data.scene(index)
        assert image.shape == (96, 96, 3) and image.dtype == np.uint8
        grey = image.astype(float).mean(2)
        assert grey[labels > 0].mean() > grey[labels == 0].mean() + 40
        counts += np.bincount(labels.ravel(), minlength=256)
    assert counts[11:].sum() == 0
    assert (counts[:11] > 0).all()
    assert len(data.metainfo['classes']) == len(data.metainfo['palette']) == 11


def test_impossible_scenes_and_parts():
    for field, value in (('split', 'val'), ('size', 20)):
        with pytest.raises(ValueError, match=f'^{field}='):
            scenes(**{field: value})
    for part, dev_size in (('train', 0), ('train', 10), ('val', 2)):
        field = 'part' if part == 'val' else 'dev_size'
        with pytest.raises(ValueError, match=f'^{field}='):
            part_indices(10, part, dev_size)


CAMVID = dict(img_path='images/train', seg_map_path='annotations/train')


@pytest.mark.parametrize('name', ['ADE20K', 'Cityscapes', 'PascalContext59', 'CamVid'])
def test_what_is_missing_is_named_with_the_page_that_helps(name, tmp_path):
    suffix = dict(img_suffix='.jpg', seg_map_suffix='.png')
    config = dict(type=name, data_root=str(tmp_path), data_prefix=CAMVID, ann_file='', **suffix)

    def said(**options: str) -> str:
        with pytest.raises(ValueError, match=r'docs/segmentation\.md') as caught:
            DATASETS.build({**config, **options})
        return str(caught.value)

    assert 'images/train does not exist' in said()
    (tmp_path / 'images/train').mkdir(parents=True)
    (tmp_path / 'annotations/train').mkdir(parents=True)
    assert 'images/train/*.jpg names no image' in said()
    write_pair(tmp_path, 'images/train/a.jpg', 'annotations/train/b.png', np.zeros((4, 4)))
    assert re.search(r'a\.jpg has no label map .*a\.png', said())
    assert 'lists/train.txt does not exist' in said(ann_file='lists/train.txt')
    (tmp_path / 'train.txt').touch()
    assert 'train.txt names no image' in said(ann_file='train.txt')
    (tmp_path / 'annotations/train/b.png').rename(tmp_path / 'annotations/train/a.png')
    (pair,) = (DATASETS.build(config).get_data_info(0),)
    assert Path(pair['seg_map_path']).name == 'a.png'


@pytest.mark.parametrize('prefix', [{}, {'seg_map_path': None}])
def test_images_without_label_maps(prefix, tmp_path):
    write_pair(tmp_path, 'images/train/a.jpg', 'annotations/train/a.png', np.zeros((4, 4)))
    prefix = {'img_path': CAMVID['img_path'], **prefix}
    kwargs: dict = dict(data_root=str(tmp_path), data_prefix=prefix)
    steps = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]
    assert CamVid(**kwargs, pipeline=steps[:1])[0]['img'].shape == (4, 4, 3)
    with pytest.raises(ValueError, match=r'a\.jpg has no label map: name .*data_prefix\.seg_map'):
        CamVid(**kwargs, pipeline=steps)[0]
    with pytest.raises(ValueError, match=r'data_prefix\.img_path=None is not possible: the folder'):
        CamVid(data_root=str(tmp_path), data_prefix=dict(img_path=None))


def test_ade20k_layout_with_mmsegs_conventions(tmp_path):
    labels = np.array([[0, 1], [2, 150]])
    prefix = dict(img_path='images/training', seg_map_path='annotations/training')
    write_pair(tmp_path, 'images/training/A.jpg', 'annotations/training/A.png', labels)
    pipeline = [dict(type='LoadImage'), dict(type='LoadLabels', num_classes=150)]
    data = ADE20K(data_root=str(tmp_path), data_prefix=prefix, pipeline=pipeline)
    # 0 is no class; 1..150 become 0..149
    assert data[0]['gt_seg_map'].tolist() == [[255, 0], [1, 149]]
    assert len(data.metainfo['classes']) == 150


def test_an_image_that_a_transform_cannot_take_is_named_with_the_reason(tmp_path):
    write_pair(tmp_path, 'images/train/a.png', 'annotations/train/a.png', np.zeros((8, 8)))
    steps = [dict(type='LoadImageFromFile'), dict(type='Resize', scale_factor=0.01)]
    data = CamVid('.png', data_root=str(tmp_path), data_prefix=CAMVID, pipeline=steps)
    with pytest.raises(ValueError, match=r'a\.png is nothing that .*resize'):
        data[0]


def test_dev_is_set_aside_of_train_in_runs_of_neighbours():
    train, dev = part_indices(367, 'train', 60), part_indices(367, 'dev', 60)
    assert sorted(train + dev) == list(range(367)) == part_indices(367, 'all', 0)
    # blocks of 19 or 20: three whole ones and a rest, so at most four runs
    assert sum(b - a > 1 for a, b in pairwise(dev)) + 1 <= 4
    # as in the rows that are checked in: with others their scores would not compare
    assert dev == [*range(40, 80), *range(196, 215), 272]
