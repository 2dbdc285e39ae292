import pickle
from pathlib import Path
from typing import Any

import cv2
import mmcv
import numpy as np
import pytest
from mmcv.transforms import BaseTransform
from mmseg.registry import DATASETS

from vqmoe_vision.engine.images import digit_scans
from vqmoe_vision.segmentation.datasets import ADE20K, CamVid, DigitScenes, digit_scene_maker

from .conftest import write_pair


def scenes(split: str = 'train', **kwargs: int) -> DigitScenes:
    return DigitScenes(split=split, **{'num_scenes': 8, 'size': 64, **kwargs}, pipeline=[])


def test_scene_depends_on_index_split_and_seed_only() -> None:
    first, again = scenes(), pickle.loads(pickle.dumps(scenes()))
    assert (first[3]['img'] == again[3]['img']).all()
    assert (first[3]['gt_seg_map'] == again[3]['gt_seg_map']).all()
    assert (first[3]['img'] != first[4]['img']).any()
    assert (first[3]['img'] != scenes('dev')[3]['img']).any()
    assert (first[3]['img'] != scenes(seed=1)[3]['img']).any()


def test_scene_is_an_image_with_a_label_map() -> None:
    counts = np.zeros(256, int)
    data = scenes(num_scenes=60, size=96)
    for index in range(len(data)):
        scene = data.scene(index)
        assert scene.image.shape == (96, 96, 3) and scene.image.dtype == np.uint8
        assert scene.labels.shape == (96, 96)
        counts += np.bincount(scene.labels.ravel(), minlength=256)
    assert counts[11:].sum() == 0
    assert (counts[:11] > 0).all()
    assert len(data.metainfo['classes']) == len(data.metainfo['palette']) == 11


def test_strokes_are_brighter_than_the_background() -> None:
    scene = scenes().scene(0)
    grey = scene.image.astype(float).mean(2)
    assert grey[scene.labels > 0].mean() > grey[scene.labels == 0].mean() + 40


def test_validation_scenes_are_made_of_held_out_scans(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def spy(split: str) -> tuple[np.ndarray, np.ndarray]:
        asked.append(split)
        return digit_scans(split)

    monkeypatch.setattr('vqmoe_vision.segmentation.datasets.digit_scans', spy)
    scenes('dev')
    assert asked == ['dev']


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(split='val'), "split='val'"),
        (dict(size=20), 'size=20 must be at least 48'),
    ],
)
def test_impossible_scenes(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scenes(**arguments)


def test_maker_needs_a_split() -> None:
    with pytest.raises(ValueError, match='split'):
        digit_scene_maker('all', 64, 0)


CAMVID = dict(img_path='images/train', seg_map_path='annotations/train')


def camvid(root: Path) -> CamVid:
    return CamVid(data_root=str(root), data_prefix=CAMVID, pipeline=[])


def test_camvid_pairs(tmp_path: Path) -> None:
    for name in ('b', 'a'):
        write_pair(
            tmp_path, f'images/train/{name}.jpg', f'annotations/train/{name}.png', np.zeros((4, 4))
        )
    pairs = [camvid(tmp_path)[i] for i in range(2)]
    assert [Path(pair['img_path']).name for pair in pairs] == ['a.jpg', 'b.jpg']
    assert [Path(pair['seg_map_path']).name for pair in pairs] == ['a.png', 'b.png']
    assert CamVid.METAINFO['classes'][0] == 'sky' and len(CamVid.METAINFO['classes']) == 11


def test_missing_data_set_says_layout_and_source(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'images/train does not exist; expected .*http://mi\.eng'):
        camvid(tmp_path)
    (tmp_path / 'images/train').mkdir(parents=True)
    (tmp_path / 'annotations/train').mkdir(parents=True)
    with pytest.raises(ValueError, match=r'images/train/\*\.jpg names no image'):
        camvid(tmp_path)


def test_image_without_label_map_is_named(tmp_path: Path) -> None:
    write_pair(tmp_path, 'images/train/a.jpg', 'annotations/train/b.png', np.zeros((4, 4)))
    with pytest.raises(ValueError, match=r'1 of 1 images have no label map: .*a\.jpg needs .*a\.p'):
        camvid(tmp_path)


def test_missing_list_of_images_is_named(tmp_path: Path) -> None:
    write_pair(tmp_path, 'images/train/a.jpg', 'annotations/train/a.png', np.zeros((4, 4)))
    with pytest.raises(ValueError, match=r'lists/train\.txt does not exist; expected .*http'):
        CamVid(data_root=str(tmp_path), data_prefix=CAMVID, ann_file='lists/train.txt', pipeline=[])


def test_a_list_that_names_no_image(tmp_path: Path) -> None:
    write_pair(tmp_path, 'images/train/a.jpg', 'annotations/train/a.png', np.zeros((4, 4)))
    (tmp_path / 'train.txt').touch()
    with pytest.raises(ValueError, match=r'/train\.txt names no image; expected .*http'):
        CamVid(data_root=str(tmp_path), data_prefix=CAMVID, ann_file='train.txt', pipeline=[])


@pytest.mark.parametrize('prefix', [{}, {'seg_map_path': None}])
def test_images_without_label_maps(prefix: dict[str, None], tmp_path: Path) -> None:
    write_pair(tmp_path, 'images/train/a.jpg', 'annotations/train/a.png', np.zeros((4, 4)))
    prefix = {'img_path': CAMVID['img_path'], **prefix}
    kwargs: dict = dict(data_root=str(tmp_path), data_prefix=prefix)
    steps = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]
    assert CamVid(**kwargs, pipeline=steps[:1])[0]['img'].shape == (4, 4, 3)
    with pytest.raises(ValueError, match=r'a\.jpg has no label map: name .*data_prefix\.seg_map'):
        CamVid(**kwargs, pipeline=steps)[0]
    with pytest.raises(ValueError, match=r'data_prefix\.img_path=None is not possible: the folder'):
        CamVid(data_root=str(tmp_path), data_prefix=dict(img_path=None))


@pytest.mark.parametrize('name', ['ADE20K', 'Cityscapes', 'PascalContext59'])
def test_other_data_sets_say_what_is_missing(name: str, tmp_path: Path) -> None:
    prefix = dict(img_path='images', seg_map_path='labels')
    with pytest.raises(ValueError, match=r'images does not exist; expected .*https?://'):
        DATASETS.build(dict(type=name, data_root=str(tmp_path), data_prefix=prefix, ann_file=''))


def test_ade20k_layout_with_mmsegs_conventions(tmp_path: Path) -> None:
    labels = np.array([[0, 1], [2, 150]])
    prefix = dict(img_path='images/training', seg_map_path='annotations/training')
    write_pair(tmp_path, 'images/training/A.jpg', 'annotations/training/A.png', labels)
    pipeline = [dict(type='LoadImage'), dict(type='LoadLabels', num_classes=150)]
    data = ADE20K(data_root=str(tmp_path), data_prefix=prefix, pipeline=pipeline)
    # 0 is no class; 1..150 become 0..149
    assert data[0]['gt_seg_map'].tolist() == [[255, 0], [1, 149]]
    assert len(data.metainfo['classes']) == 150


class _Hue(BaseTransform):
    """What PhotoMetricDistortion does to some images."""

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        results['img'] = mmcv.bgr2hsv(results['img'])
        return results


HUE, RESIZE = dict(type=_Hue), dict(type='Resize', scale_factor=0.01)


@pytest.mark.parametrize(
    ('color_type', 'kind', 'step', 'said'),
    [
        ('grayscale', np.uint8, HUE, 'is nothing that .*channels'),
        ('unchanged', np.uint16, HUE, 'is nothing that .*depth'),
        ('color', np.uint8, RESIZE, 'is nothing that .*resize'),
    ],
)
def test_an_image_that_a_transform_cannot_take_is_named_with_the_reason(
    color_type: str, kind: Any, step: dict, said: str, tmp_path: Path
) -> None:
    write_pair(tmp_path, 'images/train/a.png', 'annotations/train/a.png', np.zeros((8, 8)))
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(kind)
    assert cv2.imwrite(str(tmp_path / 'images/train/a.png'), pixels)
    load = dict(type='LoadImageFromFile', color_type=color_type)
    folders = dict(img_path='images/train', seg_map_path='annotations/train')
    data = CamVid('.png', data_root=str(tmp_path), data_prefix=folders, pipeline=[load, step])
    with pytest.raises(ValueError, match=rf'a\.png {said}'):
        data[0]
