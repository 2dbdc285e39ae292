"""A user's own data, with the config of docs/how-to/own-data.md in a folder outside the clone."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from vqmoe_vision.segmentation import predict
from vqmoe_vision.segmentation.datasets import CamVid, CheckedDataset, complete_metainfo
from vqmoe_vision.segmentation.inference import main as predict_cli

from ..rows import printed_config
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


def test_trains_tests_draws_and_predicts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
    # the colours with which tests draw; a checkpoint keeps them
    meta = torch.load(checkpoint, weights_only=True)['meta']['dataset_meta']
    assert meta['classes'] == CLASSES
    colours = np.array(meta['palette'])
    assert colours.tolist() == [[0, 0, 0], [60, 180, 75], [245, 130, 48]]
    assert (first.overlay[..., ::-1] == colours[first.labels]).all()


RED = [255, 0, 0]


@pytest.mark.parametrize(
    'metainfo',
    [
        None,
        dict(palette=[RED]),
        dict(classes=('a', 'b'), palette=[RED]),
        dict(classes='leaf'),
        dict(classes=('a', 'b', 'a')),
        dict(classes=('a', ' ')),
    ],
)
def test_classes_and_palette(metainfo: dict | None) -> None:
    with pytest.raises(ValueError, match=r'metainfo.*classes|palette does not match classes'):
        CheckedDataset(metainfo=metainfo, lazy_init=True)


def test_classes_in_a_file_and_in_another_order_than_the_colours(tmp_path: Path) -> None:
    names = tmp_path / 'names.txt'
    names.write_text('leaf\nstem\n \n\n')
    data = CheckedDataset(metainfo=dict(classes=str(names)), lazy_init=True)
    assert data.metainfo['classes'] == ['leaf', 'stem'] and len(data.metainfo['palette']) == 2
    assert data.metainfo == complete_metainfo(CheckedDataset, dict(classes=str(names)))
    names.write_text('leaf\n\nstem')
    with pytest.raises(ValueError, match=r'^metainfo\.classes='):
        CheckedDataset(metainfo=dict(classes=str(names)), lazy_init=True)
    for size in (2, 11):
        classes, colours = (CamVid.METAINFO[part][:size][::-1] for part in ('classes', 'palette'))
        names.write_text('\n'.join(classes))
        for given in (classes, str(names)):
            metainfo = dict(classes=given)
            assert CamVid(metainfo=metainfo, lazy_init=True).metainfo['palette'] == colours
            assert complete_metainfo(CamVid, metainfo)['palette'] == colours


def test_some_classes_of_a_known_data_set(tmp_path: Path) -> None:
    labels = np.array([[0, 3, 8], [10, 255, 3]])
    write_pair(tmp_path, 'images/a.jpg', 'masks/a.png', labels)
    kwargs: dict[str, Any] = dict(
        data_root=str(tmp_path),
        data_prefix=dict(img_path='images', seg_map_path='masks'),
        pipeline=[dict(type='LoadImage'), dict(type='LoadLabels')],
    )
    data = CamVid(metainfo=dict(classes=('car', 'road')), **kwargs)
    assert data[0]['gt_seg_map'].tolist() == [[255, 1, 0], [255, 255, 1]]
    assert data.metainfo['palette'] == [[64, 0, 128], [128, 64, 128]]
    cv2.imwrite(str(tmp_path / 'masks/a.png'), np.full((2, 3), 11, np.uint8))
    # what the files may hold, not what is left of it
    with pytest.raises(ValueError, match=r'holds the label 11; allowed are 0\.\.10, and 255'):
        data[0]
