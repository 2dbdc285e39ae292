"""The command line from end to end, on scenes of digits and a model of a few hundred weights."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmseg.registry import MODELS

from vqmoe_vision.engine.checkpoint import read_state
from vqmoe_vision.engine.cli import load_config
from vqmoe_vision.engine.cli import predict as predict_cli
from vqmoe_vision.segmentation import predict
from vqmoe_vision.segmentation.inference import Predictor, _read
from vqmoe_vision.segmentation.transforms import LoadImage

from .. import refused
from ..runs import score, train

ROOT = Path(__file__).parents[2]
SCENES = ROOT / 'configs/segmentation/segmenter_vit-4x96-vqmoe_mask_1xb64-1k_digits-48x48.py'
TINY = f"""
_base_ = {str(SCENES)!r}
experiment_name = NAME  # mmengine keeps one logger per name in a process
model = dict(
    backbone=dict(patch_size=16, depth=2, embed_dim=12, num_heads=3, moe=dict(num_experts=2)),
    decode_head=dict(num_layers=1),
)
train_dataloader = dict(
    batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(num_scenes=4)
)
val_dataloader = dict(batch_size=2, dataset=dict(num_scenes=3))
test_dataloader = val_dataloader
train_cfg = dict(max_iters=2, val_interval=2)
default_hooks = dict(checkpoint=dict(interval=2), logger=dict(interval=1))
param_scheduler = []
"""


def write_config(folder: Path, name: str) -> str:
    path = folder / 'tiny.py'
    path.write_text(TINY.replace('NAME', repr(name)))
    return str(path)


def write_variant(config: str, text: str) -> str:
    path = Path(config).with_name('variant.py')
    path.write_text(f'_base_ = {config!r}\n{text}\n')
    return str(path)


@pytest.fixture
def config(tmp_path, request) -> str:
    return write_config(tmp_path, request.node.name)


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('trained')
    config = write_config(folder, 'trained')
    return train(config, folder / 'run')


def test_training_logs_losses_statistics_and_metrics(trained):
    (scalars,) = trained.glob('*/vis_data/scalars.json')
    records = [json.loads(line) for line in scalars.read_text().splitlines()]
    layer, names = 'blocks.1.mlp', set().union(*records)
    assert {'loss', 'decode.loss_ce', 'aAcc', 'mAcc', 'mIoU', f'{layer}/balance_loss'} <= names
    assert (trained / 'iter_2.pth').is_file() and (trained / 'best_mIoU_iter_2.pth').is_file()
    (validation,) = (record for record in records if 'mIoU' in record)
    assert validation['step'] == 2
    loads = [f'{part}/{layer}/load_max' for part in ('train_epoch', 'val')]
    (train,), (held_out,) = ([r[name] for r in records if name in r] for name in loads)
    assert train != held_out


@pytest.mark.parametrize('options', [[], ['--tta']])
@pytest.mark.parametrize('batch_size', [1, 2])
def test_test_writes_metrics_and_overlays(trained, config, tmp_path, batch_size, options):
    shown = tmp_path / 'shown'
    metrics = score(
        config, trained / 'iter_2.pth', tmp_path, f'test_dataloader.batch_size={batch_size}',
        arguments=['--show-dir', str(shown), *options],
    )  # fmt: skip
    assert all(0 <= metrics[name] <= 100 for name in ('aAcc', 'mAcc', 'mIoU'))
    assert 'blocks.1.mlp/load_unused' in metrics
    pictures = sorted(shown.rglob('*.png'))
    assert [p.name for p in pictures] == [f'test_0000{i}_0.png' for i in range(3)]
    assert cv2.imread(str(pictures[0])).shape == (96, 192, 3)  # labels beside predictions


WRAPPED = """
scenes = {{_base_.test_dataloader.dataset}}
test_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='ConcatDataset',
        datasets=[scenes, dict(type='RepeatDataset', dataset=scenes, times=2)],
    )
)
del scenes
"""


def test_a_wrapped_test_set_is_tested_augmented_and_predicted(trained, config, tmp_path):
    checkpoint, wrapped = str(trained / 'iter_2.pth'), write_variant(config, WRAPPED)
    image = np.random.default_rng(0).integers(256, size=(40, 50, 3), dtype=np.uint8)
    (found,), (expected,) = (predict(path, checkpoint, image) for path in (wrapped, config))
    assert (found.labels == expected.labels).all() and found.classes == expected.classes
    work = tmp_path / 'work'
    scores = score(wrapped, checkpoint, work, arguments=['--tta', '--show-dir', str(work)])
    assert 0 <= scores['mIoU'] <= 100
    pictures = {picture.name for picture in work.rglob('*.png')}
    assert pictures == {f'test_0000{scene}_{turn}.png' for scene in range(3) for turn in range(3)}
    inner = 'test_dataloader.dataset.datasets.1.dataset.pipeline'
    with pytest.raises(ValueError, match='data sets that prepare images alike'):
        Predictor(wrapped, checkpoint, options={inner: [dict(type='PackSegInputs', meta_keys=())]})


@pytest.mark.parametrize('num_workers', [0, pytest.param(2, marks=pytest.mark.long)])
def test_resumed_run_equals_an_uninterrupted_one(config, tmp_path, num_workers):
    loader = f'num_workers={num_workers} persistent_workers={num_workers > 0}'
    options = [f'train_dataloader.{word}' for word in loader.split()]
    options += ['train_dataloader.sampler.type=SeededInfiniteSampler', 'train_cfg.max_iters=4']
    options.append('default_hooks.checkpoint.max_keep_ckpts=-1')
    whole, resumed = train(config, tmp_path / 'whole', *options), tmp_path / 'resumed'
    resumed.mkdir()
    shutil.copy(whole / 'iter_2.pth', resumed)
    (resumed / 'last_checkpoint').write_text(str(resumed / 'iter_2.pth'))
    train(config, resumed, *options, resume=True)
    expected, found = (read_state(str(work / 'iter_4.pth')) for work in (whole, resumed))
    assert any(name.endswith('codebook.embed') for name in expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def test_python_in_three_lines(trained, config):
    checkpoint, grey = str(trained / 'iter_2.pth'), noise(20, 30)
    colour = np.repeat(grey[..., None], 3, axis=2)
    images = [grey, colour, np.dstack([colour, noise(20, 30, seed=1)])]  # with transparency
    images += [noise(1, 50, 3), noise(3, 400, 3)]
    found = list(predict(config, checkpoint, images))
    for image, result in zip(images, found, strict=True):
        assert result.labels.shape == image.shape[:2] and result.labels.max() < 11
        assert result.overlay.shape == (*image.shape[:2], 3)
        assert result.classes[0] == 'background'
    assert all((found[0].labels == other.labels).all() for other in found[1:3])
    for wrong in (noise(20), noise(8, 8, 2), noise(8, 8, 3).astype(float)):
        refused(r'^image=', _read, wrong, LoadImage())


@pytest.mark.parametrize('option', [('shift', 'fog_3'), ('color_type', 'grayscale')])
@pytest.mark.parametrize('as_file', [True, False])
def test_prediction_reads_images_as_the_test_does(option, as_file, trained, config, tmp_path):
    image, checkpoint = noise(40, 50, 3), str(trained / 'iter_2.pth')
    path = tmp_path / 'a.png'
    cv2.imwrite(str(path), image)
    name, value = option
    seen = LoadImage(**{name: value}).read(str(path))
    if seen.ndim == 2 and not as_file:  # decoders round otherwise
        seen = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    (expected,) = predict(config, checkpoint, seen)
    options = {f'test_dataloader.dataset.pipeline.0.{name}': value}
    predictor = Predictor(config, checkpoint, options=options)
    found = predictor(path if as_file else image, opacity=0.0)
    assert (found.labels == expected.labels).all()
    assert (found.overlay == (seen if seen.ndim == 3 else seen[..., None])).all()


def test_classes_that_a_config_chooses(trained, config, tmp_path):
    def choosing(*classes: str, heads: int = 11) -> str:
        ours = f'test_dataloader = dict(dataset=dict(metainfo=dict(classes={classes})))'
        return write_variant(config, f'{ours}\nmodel = dict(decode_head=dict(num_classes={heads}))')

    chosen, checkpoint = choosing('3', '1', heads=2), str(tmp_path / 'two.pth')
    torch.save(MODELS.build(load_config(chosen).model).state_dict(), checkpoint)
    predictor = Predictor(chosen, checkpoint)
    assert predictor.classes == ('3', '1')
    # BGR; the palette of the data set, where digit d is entry d + 1
    assert predictor.palette.tolist() == [[200, 130, 0], [75, 180, 60]]
    for classes, message in (
        (('3', '1'), r'^model\.decode_head\.num_classes=11 '),
        (('1', '0', 'background', *'23456789'), r"class 0 is 'background', .* is '1'; give"),
        (('cat',), r"'cat',\) is not a subset of classes"),
    ):
        refused(message, Predictor, choosing(*classes), str(trained / 'iter_2.pth'))


def test_mistakes_of_prediction(trained, config, tmp_path):
    bad, twin = tmp_path / 'bad.png', tmp_path / 'bad.jpg'
    bad.write_bytes(b'no image')
    (tmp_path / 'empty').mkdir()
    cifar10 = str(ROOT / 'configs/classification/cifar10.py')
    for path, arguments, message in (
        (config, [tmp_path / 'none.png'], 'none.png'),
        (config, [bad], r'bad\.png cannot be read as an image'),
        (config, [tmp_path / 'empty'], 'holds no image'),
        (config, [bad, twin], 'images='),
        (config, [bad, '--opacity', 2], '--opacity='),
        ('test_dataloader = None', [bad], 'test_dataloader=None'),
        (cifar10, [bad], 'segmentor'),
        (config, [bad, '--cfg-options', 'model.backbone.moe.num_experts=4'], 'shapes: .*experts'),
    ):
        path = write_variant(config, path) if '=' in path else path
        command = [path, trained / 'iter_2.pth', *arguments, f'--out-dir={tmp_path}/out']
        refused(message, predict_cli, [str(word) for word in command], error=SystemExit)


@pytest.mark.parametrize('tool', ['predict', 'demo', 'train'])
def test_without_mmsegmentation_it_says_what_to_install(tool, monkeypatch):
    for name in [name for name in sys.modules if name.startswith('vqmoe_vision.segmentation')]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, 'mmcv', None)
    images = ['a.pth', __file__] if tool == 'predict' else []
    monkeypatch.setattr(sys, 'argv', [tool, str(SCENES), *images])
    with pytest.raises(SystemExit, match=r"^error: .* pip install '\.\[seg.*\]'$"):
        runpy.run_path(str(ROOT / f'tools/{tool}.py'), run_name='__main__')
