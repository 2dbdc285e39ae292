"""A user's own data, with the config of docs/how-to/own-data.md in a folder outside the clone."""

import pickle
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import timm
import torch
from mmseg.registry import DATASETS

from vqmoe_vision.engine.checkpoint import read_content
from vqmoe_vision.engine.cli import predict as predict_cli
from vqmoe_vision.segmentation import datasets, predict
from vqmoe_vision.segmentation.datasets import ADE20K, CamVid, CheckedDataset, DigitScenes

from .. import cases, refused
from ..rows import CONFIGS, printed_config
from ..runs import score, train
from .conftest import write_pair

CLASSES = ('background', 'leaf', 'stem')
LOADER = dict(num_workers=0, persistent_workers=False)
TINY = f"""
_base_ = 'mine.py'
model = dict(
    backbone=dict(
        model_name='vit_tiny_vqmoe', patch_size=32, depth=4, embed_dim=12, num_heads=3,
        moe=dict(num_experts=2),
    ),
    decode_head=dict(num_layers=1),
)
train_dataloader = dict(batch_size=2, **{LOADER})
val_dataloader = dict(**{LOADER})
test_dataloader = val_dataloader
train_cfg = dict(max_iters=1, val_interval=1)
param_scheduler = []
"""


def test_trains_tests_draws_and_predicts(tmp_path, capsys):
    labels, data = np.random.default_rng(0).integers(0, 3, (24, 32)), tmp_path / 'data'
    for name in ('train/a', 'train/b', 'val/a', 'val/b'):
        write_pair(data, f'images/{name}.jpg', f'masks/{name}.png', labels)
    (tmp_path / 'mine.py').write_text(printed_config('Segmentation', str(data)))
    (tmp_path / 'tiny.py').write_text(TINY)
    config, shown, out = (str(tmp_path / name) for name in ('tiny.py', 'shown', 'out'))
    work = train(config, tmp_path / 'w')
    checkpoint = work / 'iter_1.pth'
    scores = score(config, checkpoint, work, arguments=['--show-dir', shown])
    assert 0 <= scores['mIoU'] <= 100
    assert 'leaf' in capsys.readouterr().out  # the table per class
    assert sorted(p.name for p in Path(shown).rglob('*.png')) == ['a_0.png', 'b_0.png']
    photos = tmp_path / 'data/images/val'
    predict_cli([config, str(checkpoint), str(photos), '--out-dir', out])
    first, _ = predict(config, str(checkpoint), photos, opacity=1.0)
    assert first.classes == CLASSES and first.labels.shape == (24, 32)
    assert (cv2.imread(f'{out}/labels/a.png', -1) == first.labels).all()
    assert {p.name for p in Path(out, 'overlays').iterdir()} == {'a.png', 'b.png'}
    meta = torch.load(checkpoint, weights_only=True)['meta']['dataset_meta']
    assert meta['classes'] == CLASSES
    colours = np.array(meta['palette'])
    assert colours.tolist() == [[0, 0, 0], [60, 180, 75], [245, 130, 48]]
    assert (first.overlay[..., ::-1] == colours[first.labels]).all()


RED = [255, 0, 0]


@cases(
    'metainfo',
    None,
    dict(palette=[RED]),
    dict(classes=('a', 'b'), palette=[RED]),
    dict(classes=('a', 'b', 'a')),
)
def test_classes_and_palette(metainfo):
    said = r'metainfo.*classes|palette does not match classes'
    refused(said, CheckedDataset, metainfo=metainfo, lazy_init=True)


def test_classes_in_a_file_and_in_another_order_than_the_colours(tmp_path):
    names = tmp_path / 'names.txt'
    given = dict(metainfo=dict(classes=str(names)), lazy_init=True)
    names.write_text('leaf\nstem\n \n\n')
    data = CheckedDataset(**given)
    assert data.metainfo['classes'] == ['leaf', 'stem'] and len(data.metainfo['palette']) == 2
    assert data.metainfo == datasets.complete_metainfo(CheckedDataset, given['metainfo'])
    names.write_text('leaf\n\nstem')
    refused(r'^metainfo\.classes=', CheckedDataset, **given)
    classes, colours = (CamVid.METAINFO[part][::-1] for part in ('classes', 'palette'))
    names.write_text('\n'.join(classes))
    for metainfo in (dict(classes=classes), given['metainfo']):
        assert CamVid(metainfo=metainfo, lazy_init=True).metainfo['palette'] == colours
        assert datasets.complete_metainfo(CamVid, metainfo)['palette'] == colours


def test_some_classes_of_a_known_data_set(tmp_path):
    labels = np.array([[0, 3, 8], [10, 255, 3]])
    write_pair(tmp_path, 'images/a.jpg', 'masks/a.png', labels)
    data = CamVid(
        metainfo=dict(classes=('car', 'road')),
        data_root=str(tmp_path),
        data_prefix=dict(img_path='images', seg_map_path='masks'),
        pipeline=[dict(type='LoadImage'), dict(type='LoadLabels')],
    )
    assert data[0]['gt_seg_map'].tolist() == [[255, 1, 0], [255, 255, 1]]
    assert data.metainfo['palette'] == [[64, 0, 128], [128, 64, 128]]
    cv2.imwrite(str(tmp_path / 'masks/a.png'), np.full((2, 3), 11, np.uint8))
    refused(r'holds the label 11; allowed are 0\.\.10, and 255', data.__getitem__, 0)


ADE = CONFIGS / 'segmentation/ade20k'
SIZES: dict[str, Any] = dict(patch_size=16, depth=4, embed_dim=12, num_heads=3)
STEPS = 'train_dataloader.dataset.pipeline'
# crops and windows of 64 pixels
SMALL = [f'{STEPS}.2.scale=(256,64)', f'{STEPS}.3.crop_size=(64,64)']
SMALL.append('val_dataloader.dataset.pipeline.1.scale=(256,64)')
TINY_ADE = """
_base_ = BASE
model = dict(
    backbone=dict(img_size=(64, 64), **BACKBONE), decode_head=dict(num_layers=1),
    data_preprocessor=dict(size=(64, 64)), test_cfg=dict(crop_size=(64, 64), stride=(60, 60)),
)
data = dict(data_root=ROOT, dev_size=2)
loader = dict(batch_size=2, num_workers=0, persistent_workers=False)
train_dataloader = dict(dataset=data, **loader)
val_dataloader = dict(dataset=data, **loader)
test_dataloader = dict(dataset=dict(data_root=ROOT), **loader)
train_cfg = dict(max_iters=2, val_interval=2)
default_hooks = dict(checkpoint=dict(interval=2))
del data, loader
"""


@pytest.mark.parametrize('way', ['pretrained', 'checkpoint'])
def test_two_iterations(way, tmp_path):
    labels = np.random.default_rng(0).integers(0, 151, (40, 60))
    for name in 'abcd':
        image, label = f'images/training/{name}.jpg', f'annotations/training/{name}.png'
        write_pair(tmp_path / 'data', image, label, labels)
    dense = timm.create_model('vit_small_patch16_384', img_size=96, **SIZES).state_dict()
    path = str(tmp_path / 'dense.pth')  # in the place of the hub
    torch.save(dense, path)
    given = dict(pretrained=False, checkpoint=path)
    if way == 'pretrained':
        given = dict(pretrained=True, pretrained_cfg_overlay=dict(file=path))
    base = ADE / 'segmenter_vit-s-vqmoe-in21k-pre_mask_8xb1-160k_ade20k-512x512.py'
    backbone = {**SIZES, 'moe': dict(num_experts=2), **given}
    text = TINY_ADE.replace('BASE', repr(str(base))).replace('BACKBONE', repr(backbone))
    (tmp_path / 'tiny.py').write_text(text.replace('ROOT', repr(f'{tmp_path}/data')))
    # nothing moves: what a run saves is what it has started from
    still = [*SMALL, 'optim_wrapper.optimizer.lr=0.0', 'param_scheduler=[]']
    train(tmp_path / 'tiny.py', tmp_path / 'w', *still)
    state = read_content(str(tmp_path / 'w/iter_2.pth'))['state_dict']
    assert state['normalization'].unique().tolist() == [0.5]
    for weight in state['backbone.model.blocks.3.mlp.experts.fc1.weight']:
        assert torch.equal(weight, dense['blocks.3.mlp.fc1.weight'])
    assert state['backbone.model.pos_embed'].shape == (1, 17, 12)


def scenes(split: str = 'train', **kwargs: int) -> DigitScenes:
    return DigitScenes(split=split, **{'num_scenes': 8, 'size': 64, **kwargs}, pipeline=[])


def test_scene_depends_on_index_split_and_seed_only():
    first, again = scenes()[3], pickle.loads(pickle.dumps(scenes()))[3]
    assert all((first[part] == again[part]).all() for part in ('img', 'gt_seg_map'))
    for other in (scenes()[4], scenes('dev')[3], scenes(seed=1)[3]):
        assert (first['img'] != other['img']).any()


def test_impossible_scenes_and_parts():
    refused('^split=', scenes, split='val')
    refused('^size=', scenes, size=20)
    refused('^part=', datasets.part_indices, 10, 'val', 2)
    for dev_size in (0, 10):
        refused('^dev_size=', datasets.part_indices, 10, 'train', dev_size)


CAMVID = dict(img_path='images/train', seg_map_path='annotations/train')


@pytest.mark.parametrize('name', ['ADE20K', 'Cityscapes', 'PascalContext59', 'CamVid'])
def test_what_is_missing_is_named_with_the_page_that_helps(name, tmp_path):
    suffix = dict(img_suffix='.jpg', seg_map_suffix='.png')
    config = dict(type=name, data_root=str(tmp_path), data_prefix=CAMVID, ann_file='', **suffix)

    def said(**options: str) -> str:
        return refused(r'docs/how-to/segmentation\.md', DATASETS.build, {**config, **options})

    assert 'images/train does not exist' in said()
    for folder in CAMVID.values():
        (tmp_path / folder).mkdir(parents=True)
    assert 'images/train/*.jpg names no image' in said()
    write_pair(tmp_path, 'images/train/a.jpg', 'annotations/train/b.png', np.zeros((4, 4)))
    assert re.search(r'a\.jpg has no label map .*a\.png', said())
    assert 'lists/train.txt does not exist' in said(ann_file='lists/train.txt')
    (tmp_path / 'train.txt').touch()
    assert 'train.txt names no image' in said(ann_file='train.txt')
    (tmp_path / 'annotations/train/b.png').rename(tmp_path / 'annotations/train/a.png')
    pair = DATASETS.build(config).get_data_info(0)
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
    refused(r'data_prefix\.img_path=None', CamVid, data_prefix=dict(img_path=None))


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
    refused(r'a\.png is nothing that .*resize', data.__getitem__, 0)


def test_dev_is_set_aside_of_train_in_runs_of_neighbours():
    train, dev = datasets.part_indices(367, 'train', 60), datasets.part_indices(367, 'dev', 60)
    assert sorted(train + dev) == list(range(367)) == datasets.part_indices(367, 'all', 0)
    # blocks of 19 or 20: three whole ones and a rest, so at most four runs
    assert sum(b - a > 1 for a, b in pairwise(dev)) + 1 <= 4
    # as in the rows that are checked in: with others their scores would not compare
    assert dev == [*range(40, 80), *range(196, 215), 272]


BINARY = """
classes = ('background', 'leaf')
for loader in (train_dataloader, val_dataloader):
    loader['dataset']['metainfo'] = dict(classes=classes, palette=[[0, 0, 0], [0, 128, 0]])
model['decode_head']['num_classes'] = 2
del loader
"""


@cases(
    'values, option, warns',
    ((0, 255), '', None),  # a mask as people paint it: its 255 is ignored
    ((1, 255), '', None),
    ((0, 1), '', False),
    ((0, 1, *[255] * 98), '', True),
    ((0, 1, *[255] * 98), 'train_dataloader.dataset.max_ignored_share=1.0', False),
)
def test_label_maps_of_one_class_are_refused_and_those_all_but_ignored_are_said(
    values, option, warns, tmp_path, capsys
):
    data = tmp_path / 'data'
    labels = np.resize(np.array(values), (20, 30))
    for name in ('train/a', 'train/b', 'val/a', 'val/b'):
        write_pair(data, f'images/{name}.jpg', f'masks/{name}.png', labels)
    (tmp_path / 'mine.py').write_text(printed_config('Segmentation', str(data)) + BINARY)
    (tmp_path / 'tiny.py').write_text(TINY)
    config, options = str(tmp_path / 'tiny.py'), [option] if option else []
    if warns is None:
        with pytest.raises(SystemExit, match=r'masks/train/a\.png .* reduce_zero_label'):
            train(config, tmp_path / 'w', *options)
        return
    train(config, tmp_path / 'w', *options)
    printed = capsys.readouterr()
    assert ('are ignored' in printed.err + printed.out) == warns
