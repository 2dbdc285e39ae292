"""A user's own data, with the config of docs/own-data.md in a folder outside the clone."""

import gc
import json
import re
from itertools import count
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmseg.registry import DATASETS

from vqmoe_vision.engine import cli
from vqmoe_vision.engine.cli import load_config
from vqmoe_vision.segmentation import predict
from vqmoe_vision.segmentation.cli import predict as predict_cli
from vqmoe_vision.segmentation.datasets import CamVid, CheckedDataset, complete_metainfo
from vqmoe_vision.segmentation.inference import Predictor

from ..rows import CONFIGS, printed_config
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
experiment_name = NAME  # mmengine keeps one logger per name in a process
"""


def write_data(root: Path, **kwargs: Any) -> None:
    for split in ('train', 'val'):
        for name in ('a', 'b'):
            labels = np.random.default_rng(0).integers(0, 3, kwargs.get('shape', (24, 32)))
            write_pair(root, f'images/{split}/{name}.jpg', f'masks/{split}/{name}.png', labels)


def write_config(folder: Path, palette: bool = True) -> str:
    """The config of the page, and one beside it that makes the model tiny."""
    text = printed_config('Segmentation', str(folder / 'data'))
    if not palette:
        text, count = re.subn(r'\n +palette=.*', '', text)
        assert count == 1
    (folder / 'mine.py').write_text(text)
    (folder / 'tiny.py').write_text(TINY.replace('NAME', repr(f'own {folder}')))
    return str(folder / 'tiny.py')


@pytest.mark.parametrize('palette', [True, pytest.param(False, marks=pytest.mark.long)])
def test_trains_tests_draws_and_predicts(
    tmp_path: Path, palette: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data(tmp_path / 'data')
    config = write_config(tmp_path, palette)
    work = tmp_path / 'w'
    cli.train([config, '--work-dir', str(work)])
    checkpoint, shown, out = work / 'iter_1.pth', tmp_path / 'shown', tmp_path / 'out'
    arguments = [config, str(checkpoint), '--work-dir', str(work), '--show-dir', str(shown)]
    cli.test([*arguments, '--out', str(tmp_path / 'm.json'), '--cfg-options', 'experiment_name=t'])
    assert 0 <= json.loads((tmp_path / 'm.json').read_text())['mIoU'] <= 100
    assert 'leaf' in capsys.readouterr().out  # the table per class
    assert sorted(p.name for p in shown.rglob('*.png')) == ['a_0.png', 'b_0.png']
    photos = tmp_path / 'data/images/val'
    predict_cli([config, str(checkpoint), str(photos), '--out-dir', str(out)])
    first, _ = predict(config, str(checkpoint), photos, opacity=1.0)
    assert first.classes == CLASSES and first.labels.shape == (24, 32)
    assert (cv2.imread(str(out / 'labels/a.png'), -1) == first.labels).all()
    # the colours with which tests draw; a checkpoint keeps them
    meta = torch.load(checkpoint, weights_only=True)['meta']['dataset_meta']
    assert meta['classes'] == CLASSES
    colours = np.array(meta['palette'])
    assert (colours.tolist() == [[0, 0, 0], [60, 180, 75], [245, 130, 48]]) == palette
    assert len(np.unique(colours, axis=0)) == 3
    assert (first.overlay[..., ::-1] == colours[first.labels]).all()


def test_mmsegs_own_data_set(tmp_path: Path) -> None:
    write_data(tmp_path / 'data')
    config = write_config(tmp_path, palette=False)
    own = (tmp_path / 'mine.py').read_text()
    text = own.replace("type='CheckedDataset',", "type='BaseSegDataset', _delete_=True,")
    text = text.replace("    part='all',\n", '')
    for split, kind in (('train', 'train'), ('val', 'test')):
        text, count = re.subn(
            rf"(dataset=dict\()(data_prefix=dict\(img_path='images/{split}')",
            rf'\1pipeline={{{{_base_.{kind}_pipeline}}}}, \2',
            text,
        )
        assert count == 1
    (tmp_path / 'mine.py').write_text(text)
    numbers = [
        f'{split}_dataloader.dataset.pipeline.{step}.num_classes=3'
        for split, step in (('train', 1), ('val', 2))
    ]
    work = ['--work-dir', str(tmp_path / 'w'), '--cfg-options', *numbers]
    cli.train([config, *work, 'experiment_name=base'])
    predictor = Predictor(config, str(tmp_path / 'w/iter_1.pth'))
    assert predictor.classes == CLASSES
    (tmp_path / 'mine.py').write_text(own)
    checked = Predictor(config, str(tmp_path / 'w/iter_1.pth'))
    assert (predictor.palette == checked.palette).all()


_NUMBERS = count()


def refused(config: str, *options: str) -> str:
    """The line that training ends with."""
    named = f'experiment_name=refused {next(_NUMBERS)}'  # several start within a second
    with pytest.raises(SystemExit) as caught:
        cli.train([config, '--work-dir', f'{config}.w', '--cfg-options', named, *options])
    line = str(caught.value)
    assert line.startswith('error: ') and '\n' not in line
    return line


def test_bad_data_is_one_line(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    data = tmp_path / 'data'
    assert 'images/train does not exist; docs/own-data.md' in refused(config)
    write_data(data)
    head = 'model.decode_head.num_classes=4'
    assert f'{head}, but the data set has 3 classes' in refused(config, head)
    masks = list(data.glob('masks/train/*.png'))
    for labels, message in (
        (np.full((24, 32), 3), r'\w\.png holds the label 3; allowed are 0\.\.2, and 255'),
        (np.zeros((24, 30)), r'\w\.png has 30x24 pixels, .*/\w\.jpg has 32x24'),
    ):
        for mask in masks:
            cv2.imwrite(str(mask), labels.astype(np.uint8))
        assert re.search(message, refused(config))


# mmengine leaves the copy of the config open that it was reading
@pytest.mark.filterwarnings('ignore:unclosed file:ResourceWarning')
def test_a_base_that_is_not_there(tmp_path: Path) -> None:
    config = tmp_path / 'mine.py'
    config.write_text("_base_ = ['nowhere/model.py']\n")
    missing = tmp_path / 'nowhere/model.py'
    assert str(missing) in refused(str(config))
    gc.collect()


RED = [255, 0, 0]


@pytest.mark.parametrize(
    ('metainfo', 'message'),
    [
        (None, r'CheckedDataset needs metainfo=dict\(classes=\(\.\.\.\)\)'),
        (dict(palette=[RED]), r'CheckedDataset needs metainfo=dict\(classes='),
        (dict(classes=('a', 'b'), palette=[RED]), 'palette does not match classes'),
        (dict(classes=('a',), palette=[RED, RED]), 'palette does not match classes'),
        (dict(classes='leaf'), r"metainfo\.classes='leaf' .* such as \('leaf',\)"),
        (dict(classes=('a', 'b', 'a')), r'^metainfo\.classes='),
        (dict(classes=('a', ' ')), r'^metainfo\.classes='),
    ],
)
def test_classes_and_palette(metainfo: dict | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CheckedDataset(metainfo=metainfo, lazy_init=True)


@pytest.mark.parametrize('end', ['', '\n', '\n\n', '\n \n\n'])
def test_classes_in_a_file(end: str, tmp_path: Path) -> None:
    names = tmp_path / 'names.txt'
    names.write_text(f'leaf\nstem{end}')
    data = CheckedDataset(metainfo=dict(classes=str(names)), lazy_init=True)
    assert data.metainfo['classes'] == ['leaf', 'stem'] and len(data.metainfo['palette']) == 2
    assert data.metainfo == complete_metainfo(CheckedDataset, dict(classes=str(names)))
    names.write_text(f'leaf\n\nstem{end}')
    with pytest.raises(ValueError, match=r'^metainfo\.classes='):
        CheckedDataset(metainfo=dict(classes=str(names)), lazy_init=True)


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


@pytest.mark.parametrize('count', [2, len(CamVid.METAINFO['classes'])])
def test_classes_of_a_known_data_set_keep_their_colours_in_any_order(
    count: int, tmp_path: Path
) -> None:
    names = CamVid.METAINFO['classes'][:count][::-1]
    colours = CamVid.METAINFO['palette'][:count][::-1]
    (tmp_path / 'names.txt').write_text('\n'.join(names))
    for classes in (names, str(tmp_path / 'names.txt')):
        metainfo = dict(classes=classes)
        assert CamVid(metainfo=metainfo, lazy_init=True).metainfo['palette'] == colours
        assert complete_metainfo(CamVid, metainfo)['palette'] == colours
    own = [[i, i, i] for i in range(count)]  # a colour each, in the order of `classes`
    metainfo = dict(classes=names, palette=own)
    assert CamVid(metainfo=metainfo, lazy_init=True).metainfo['palette'] == own


def test_number_of_classes_in_the_pipeline(tmp_path: Path) -> None:
    write_data(tmp_path)
    pipeline = [dict(type='LoadImage'), dict(type='LoadLabels', num_classes=4)]
    data = CheckedDataset(
        metainfo=dict(classes=CLASSES),
        data_root=str(tmp_path),
        data_prefix=dict(img_path='images/val', seg_map_path='masks/val'),
        pipeline=pipeline,
    )
    with pytest.raises(ValueError, match=r'num_classes=4, but the data set has 3 classes; leave'):
        data[0]


def test_camvids_test_split_is_two_options(tmp_path: Path) -> None:
    page = (CONFIGS.parent / 'docs/segmentation.md').read_text()
    options = dict(re.findall(r'(test_dataloader\.dataset\.data_prefix\.\w+)=(\S+/test)', page))
    assert len(options) == 2
    for split, label in (('val', 1), ('test', 2)):
        image, mask = f'images/{split}/{split}.jpg', f'annotations/{split}/{split}.png'
        write_pair(tmp_path, image, mask, np.full((8, 8), label))
    config: Config = load_config(
        str(CONFIGS / 'segmentation/segmenter_vit-t-vqmoe_mask_8xb1-20k_camvid-352x480.py'),
        {**options, 'test_dataloader.dataset.data_root': str(tmp_path)},
    )
    (sample,) = DATASETS.build(config.test_dataloader.dataset)
    assert Path(sample['data_samples'].img_path).name == 'test.jpg'
    assert sample['data_samples'].gt_sem_seg.data.unique().tolist() == [2]
    assert config.val_dataloader.dataset.data_prefix.img_path == 'images/train'  # its dev part
