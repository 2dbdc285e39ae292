"""The command line from end to end, on scenes of digits and a model of a few hundred weights."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import mmseg
import numpy as np
import pytest
import torch
from mmengine.runner import Runner
from mmseg.registry import MODELS

from vqmoe_vision.engine import cli
from vqmoe_vision.engine.checkpoint import read_state
from vqmoe_vision.engine.cli import load_config
from vqmoe_vision.segmentation import predict
from vqmoe_vision.segmentation.cli import predict as predict_cli
from vqmoe_vision.segmentation.inference import Predictor, list_images
from vqmoe_vision.segmentation.loading import LoadImage

from ..logs import reports

SCENES = (
    Path(__file__).parents[2]
    / 'configs/segmentation/segmenter_vit-4x96-vqmoe_mask_1xb64-1k_digits-48x48.py'
)
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
test_dataloader = dict(batch_size=2, dataset=dict(num_scenes=3))
train_cfg = dict(max_iters=2, val_interval=2)
default_hooks = dict(checkpoint=dict(interval=2), logger=dict(interval=1))
param_scheduler = []
"""


def write_config(folder: Path, name: str) -> str:
    path = folder / 'tiny.py'
    path.write_text(TINY.replace('NAME', repr(name)))
    return str(path)


def write_variant(config: str, text: str) -> str:
    """A config beside one that changes some of it."""
    path = Path(config).with_name('variant.py')
    path.write_text(f'_base_ = {config!r}\n{text}\n')
    return str(path)


@pytest.fixture
def config(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    return write_config(tmp_path, request.node.name)


@pytest.fixture(scope='module')
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Work dir of a run of two iterations."""
    folder = tmp_path_factory.mktemp('trained')
    config = write_config(folder, 'trained')
    cli.train([config, '--work-dir', str(folder / 'run')])
    return folder / 'run'


def test_training_logs_losses_statistics_and_metrics(trained: Path) -> None:
    (scalars,) = trained.glob('*/vis_data/scalars.json')
    names = set().union(*(json.loads(line) for line in scalars.read_text().splitlines()))
    layer = 'blocks.1.mlp'
    assert {'loss', 'decode.loss_ce', 'aAcc', 'mAcc', 'mIoU'} <= names
    assert {f'{layer}/balance_loss', f'{layer}/load_max', f'val/{layer}/load_unused'} <= names
    assert (trained / 'iter_2.pth').is_file()
    assert len(list(trained.glob('best_mIoU_iter_2.pth'))) == 1


def test_validation_stands_at_its_iteration_and_training_has_its_own_routing(
    trained: Path,
) -> None:
    (scalars,) = trained.glob('*/vis_data/scalars.json')
    records = [json.loads(line) for line in scalars.read_text().splitlines()]
    (validation,) = (record for record in records if 'mIoU' in record)
    assert validation['step'] == 2
    name = 'blocks.1.mlp/load_max'
    (train,) = (r[f'train_epoch/{name}'] for r in records if f'train_epoch/{name}' in r)
    (held_out,) = (r[f'val/{name}'] for r in records if f'val/{name}' in r)
    assert train != held_out
    told = reports(trained)
    steps = [report for report in told if 'Iter(train)' in report]
    assert steps and all('moe/balance_loss: ' in s and 'moe/vq_loss: ' in s for s in steps)
    assert all(len(line) <= 100 for report in told for line in report.splitlines())


def test_what_comes_first_is_about_the_run(config: str, tmp_path: Path) -> None:
    command = [sys.executable, SCENES.parents[3] / 'tools/predict.py', config]
    done = subprocess.run([*command, 'none.pth', tmp_path], capture_output=True, text=True)
    assert done.stdout == ''
    assert done.stderr.startswith(f'error: {tmp_path} holds no image')


def test_test_writes_metrics_and_overlays(trained: Path, config: str, tmp_path: Path) -> None:
    out, shown = tmp_path / 'metrics.json', tmp_path / 'shown'
    work = ['--work-dir', str(tmp_path / 'run')]
    checkpoint = str(trained / 'iter_2.pth')
    cli.test([config, checkpoint, '--out', str(out), '--show-dir', str(shown), *work])
    metrics = json.loads(out.read_text())
    assert all(0 <= metrics[name] <= 100 for name in ('aAcc', 'mAcc', 'mIoU'))
    pictures = sorted(shown.rglob('*.png'))
    assert [p.name for p in pictures] == [f'test_0000{i}_0.png' for i in range(3)]
    assert cv2.imread(str(pictures[0])).shape == (96, 192, 3)  # labels beside predictions


@pytest.mark.parametrize('batch_size', [1, 2])
def test_augmented_test(trained: Path, config: str, tmp_path: Path, batch_size: int) -> None:
    out, shown = tmp_path / 'metrics.json', tmp_path / 'shown'
    options = ['--cfg-options', f'test_dataloader.batch_size={batch_size}']
    arguments = ['--tta', '--out', str(out), '--show-dir', str(shown), '--work-dir', str(tmp_path)]
    cli.test([config, str(trained / 'iter_2.pth'), *arguments, *options])
    assert {'aAcc', 'mAcc', 'mIoU', 'blocks.1.mlp/load_unused'} <= json.loads(
        out.read_text()
    ).keys()
    # each scene once, not each of its versions
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


def test_a_wrapped_test_set_is_tested_augmented_and_predicted(
    trained: Path, config: str, tmp_path: Path
) -> None:
    checkpoint = str(trained / 'iter_2.pth')
    wrapped = write_variant(config, WRAPPED)
    image = np.random.default_rng(0).integers(256, size=(40, 50, 3), dtype=np.uint8)
    (found,), (expected,) = (predict(path, checkpoint, image) for path in (wrapped, config))
    assert (found.labels == expected.labels).all() and found.classes == expected.classes
    scores = []
    for path in (wrapped, config):
        out, work = tmp_path / 'metrics.json', str(tmp_path / Path(path).stem)
        arguments = ['--tta', '--out', str(out), '--work-dir', work, '--show-dir', work]
        cli.test([path, checkpoint, *arguments])
        scores.append(json.loads(out.read_text())['mIoU'])
    assert scores[0] == scores[1]  # the same scenes, three times
    # none overwrites another of its name
    pictures = {picture.name for picture in (tmp_path / 'variant').rglob('*.png')}
    assert pictures == {f'test_0000{scene}_{turn}.png' for scene in range(3) for turn in range(3)}
    inner = 'test_dataloader.dataset.datasets.1.dataset.pipeline'
    with pytest.raises(ValueError, match='prepare images in different ways; a prediction needs'):
        Predictor(wrapped, checkpoint, options={inner: [dict(type='PackSegInputs', meta_keys=())]})


def test_codebook_is_the_same_after_save_load_and_resume(
    trained: Path, config: str, tmp_path: Path
) -> None:
    state = read_state(str(trained / 'iter_2.pth'))
    codes = [name for name in state if '.codebook.' in name]
    assert any(name.endswith('codebook.embed') for name in codes)
    settings = load_config(config)
    settings.update(
        work_dir=str(tmp_path / 'w'), resume=True, load_from=str(trained / 'iter_2.pth')
    )
    runner = Runner.from_cfg(settings)
    runner._train_loop = runner.build_train_loop(runner._train_loop)
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    runner.load_or_resume()
    assert runner.iter == 2
    loaded = runner.model.state_dict()
    for name in codes:
        torch.testing.assert_close(loaded[name], state[name], rtol=0, atol=0)


REPEATED = """
train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='RepeatDataset',
        times=3,
        dataset={{_base_.train_dataloader.dataset}},
    )
)
"""


@pytest.mark.parametrize(
    ('num_workers', 'text'), [(0, ''), (0, REPEATED), pytest.param(2, '', marks=pytest.mark.long)]
)
def test_resumed_run_equals_an_uninterrupted_one(
    config: str, tmp_path: Path, num_workers: int, text: str
) -> None:
    config = write_variant(config, text)
    options = [
        'train_cfg.max_iters=4',
        f'train_dataloader.num_workers={num_workers}',
        f'train_dataloader.persistent_workers={num_workers > 0}',
        'train_dataloader.sampler.type=SeededInfiniteSampler',
        'default_hooks.checkpoint.max_keep_ckpts=-1',
    ]

    def train(work: Path, *arguments: str) -> dict[str, torch.Tensor]:
        named = f'experiment_name={tmp_path.name}_{work.name}'
        cli.train([config, '--work-dir', str(work), *arguments, '--cfg-options', *options, named])
        return read_state(str(work / 'iter_4.pth'))

    whole, resumed = tmp_path / 'whole', tmp_path / 'resumed'
    expected = train(whole)
    resumed.mkdir()
    shutil.copy(whole / 'iter_2.pth', resumed)
    (resumed / 'last_checkpoint').write_text(str(resumed / 'iter_2.pth'))
    found = train(resumed, '--resume')
    assert any(name.endswith('codebook.embed') for name in expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_segmentation_starts_from_a_segmentation_run(
    trained: Path, config: str, tmp_path: Path
) -> None:
    option = f'model.backbone.checkpoint={trained / "iter_2.pth"}'
    work = tmp_path / 'w'
    cli.train([config, '--work-dir', str(work), '--cfg-options', option, 'train_cfg.max_iters=1'])
    (log,) = work.glob('*/*.log')
    assert 'tensors of the backbone' in log.read_text()


@pytest.mark.parametrize(
    'row',
    [
        [],
        pytest.param(['model.backbone.model_name=vit_tiny_xmoe'], marks=pytest.mark.long),
        ['model.backbone.model_name=vit_tiny_patch16_224', 'model.backbone.moe=None'],
    ],
)
def test_mmsegmentations_own_tools_run_the_config(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: list[str]
) -> None:
    monkeypatch.delenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', raising=False)
    tools = Path(mmseg.__file__).parent / '.mim' / 'tools'
    work = str(tmp_path / 'w')
    options = ['--cfg-options', f'experiment_name={tmp_path.name}', *row]
    monkeypatch.setattr('sys.argv', ['train.py', config, '--work-dir', work, *options])
    runpy.run_path(str(tools / 'train.py'), run_name='__main__')
    arguments = [config, f'{work}/iter_2.pth', '--work-dir', work, '--show-dir', f'{work}/shown']
    options[1] += '_test'
    monkeypatch.setattr('sys.argv', ['test.py', *arguments, *options])
    runpy.run_path(str(tools / 'test.py'), run_name='__main__')
    assert len(list((tmp_path / 'w/shown').rglob('*.png'))) == 3


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize('shape', [(20, 30), (20, 30, 3), (20, 30, 4), (1, 50, 3), (3, 400, 3)])
def test_python_in_three_lines(trained: Path, config: str, shape: tuple[int, ...]) -> None:
    (result,) = predict(config, str(trained / 'iter_2.pth'), noise(*shape))
    assert result.labels.shape == shape[:2] and result.labels.max() < 11
    assert result.overlay.shape == (*shape[:2], 3)
    assert result.classes[0] == 'background'


def test_transparency_and_grey_change_nothing(trained: Path, config: str) -> None:
    grey = noise(16, 16)
    colour = np.repeat(grey[..., None], 3, axis=2)
    images = [grey, colour, np.dstack([colour, noise(16, 16, seed=1)])]
    first, *others = (r.labels for r in predict(config, str(trained / 'iter_2.pth'), images))
    assert all((first == other).all() for other in others)


@pytest.mark.parametrize('option', [('shift', 'fog_3'), ('color_type', 'grayscale')])
@pytest.mark.parametrize('as_file', [True, False])
def test_prediction_reads_images_as_the_test_does(
    option: tuple[str, str], as_file: bool, trained: Path, config: str, tmp_path: Path
) -> None:
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


def test_classes_that_a_config_chooses(trained: Path, config: str, tmp_path: Path) -> None:
    chosen = write_variant(
        config,
        "test_dataloader = dict(dataset=dict(metainfo=dict(classes=('3', '1'))))\n"
        'model = dict(decode_head=dict(num_classes=2))',
    )
    checkpoint = str(tmp_path / 'two.pth')
    torch.save(MODELS.build(load_config(chosen).model).state_dict(), checkpoint)
    predictor = Predictor(chosen, checkpoint)
    assert predictor.classes == ('3', '1')
    # BGR; the palette of the data set, where digit d is entry d + 1
    assert predictor.palette.tolist() == [[200, 130, 0], [75, 180, 60]]
    with pytest.raises(ValueError, match='num_classes=11 is not possible: 2, as many classes as'):
        options = {'model.decode_head.num_classes': 11}
        Predictor(chosen, str(trained / 'iter_2.pth'), options=options)


def test_classes_in_another_order_than_in_training(trained: Path, config: str) -> None:
    classes = ('1', '0', 'background', *'23456789')
    text = f'test_dataloader = dict(dataset=dict(metainfo=dict(classes={classes})))'
    with pytest.raises(ValueError, match=r"its class 0 is 'background', .* is '1'; give"):
        Predictor(write_variant(config, text), str(trained / 'iter_2.pth'))


def test_a_class_that_the_data_set_does_not_have(
    trained: Path, config: str, tmp_path: Path
) -> None:
    chosen = tmp_path / 'chosen.py'
    metainfo = "test_dataloader = dict(dataset=dict(metainfo=dict(classes=('cat',))))"
    chosen.write_text(f'_base_ = {config!r}\n{metainfo}\n')
    with pytest.raises(ValueError, match="'cat',\\) is not a subset of classes"):
        Predictor(str(chosen), str(trained / 'iter_2.pth'))


def test_folder_to_overlays_and_label_maps(
    trained: Path, config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / 'in', tmp_path / 'out'
    folder.mkdir()
    for name, shape in (('grey.png', (16, 20)), ('alpha.png', (9, 8, 4)), ('a.jpg', (16, 16, 3))):
        cv2.imwrite(str(folder / name), noise(*shape))
    checkpoint = str(trained / 'iter_2.pth')
    predict_cli([config, checkpoint, str(folder), '--out-dir', str(out), '--device', 'cpu'])
    assert '3/3' in capsys.readouterr().out
    labels = {p.name: cv2.imread(str(p), -1).shape for p in (out / 'labels').iterdir()}
    assert labels == {'a.png': (16, 16), 'alpha.png': (9, 8), 'grey.png': (16, 20)}
    assert {p.name for p in (out / 'overlays').iterdir()} == labels.keys()


def test_images_of_a_folder_come_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / f'{name}.png' for name in 'abc']
    for file in (*files, tmp_path / 'notes.txt'):
        file.touch()
    stored = [files[1], tmp_path / 'notes.txt', files[2], files[0]]  # as a file system may
    monkeypatch.setattr(Path, 'iterdir', lambda folder: iter(stored))
    assert list_images(tmp_path) == files


def test_mistakes_of_prediction(trained: Path, config: str, tmp_path: Path) -> None:
    checkpoint = str(trained / 'iter_2.pth')
    (tmp_path / 'bad.png').write_bytes(b'no image')
    (tmp_path / 'empty').mkdir()
    for arguments, message in (
        ([str(tmp_path / 'none.png')], 'none.png'),
        ([str(tmp_path / 'bad.png')], r'bad\.png cannot be read as an image'),
        ([str(tmp_path / 'empty')], 'holds no image'),
        ([str(tmp_path / 'bad.png'), str(tmp_path / 'bad.jpg')], 'would write the same output'),
        ([str(tmp_path / 'bad.png'), '--opacity', '2'], 'must be from 0 to 1'),
    ):
        with pytest.raises(SystemExit, match=message) as caught:
            predict_cli([config, checkpoint, *arguments, '--out-dir', str(tmp_path / 'out')])
        assert '\n' not in str(caught.value)


@pytest.mark.parametrize('name', ['model', 'test_dataloader'])
def test_prediction_needs_a_model_and_a_test(
    name: str, trained: Path, config: str, tmp_path: Path
) -> None:
    image = tmp_path / 'a.png'
    cv2.imwrite(str(image), noise(8, 8))
    lacking = write_variant(config, f'{name} = None')
    with pytest.raises(SystemExit, match=rf"variant\.py' has no {name}, without which nothing is"):
        predict_cli([lacking, str(trained / 'iter_2.pth'), str(image)])


def test_prediction_takes_the_options_of_the_run(
    trained: Path, config: str, tmp_path: Path
) -> None:
    image = tmp_path / 'a.png'
    cv2.imwrite(str(image), noise(8, 8))
    run = [config, str(trained / 'iter_2.pth'), str(image), '--out-dir', str(tmp_path)]
    for experts, problem in ((2, None), (4, r'does not fit the config: shapes: .*experts')):
        options = {'model.backbone.moe.num_experts': experts}
        command = [*run, '--cfg-options', f'model.backbone.moe.num_experts={experts}']
        if problem is None:
            predict_cli(command)
            assert len(list(predict(*run[:3], options=options))) == 1
        else:
            with pytest.raises(SystemExit, match=problem):
                predict_cli(command)
            with pytest.raises(ValueError, match=problem):
                next(predict(*run[:3], options=options))


def test_a_checkpoint_of_the_full_form_predicts_and_is_tested_in_the_discrete_one(
    trained: Path, config: str, tmp_path: Path
) -> None:
    checkpoint, option = str(trained / 'iter_2.pth'), 'model.backbone.moe.form=discrete'
    image = tmp_path / 'a.png'
    cv2.imwrite(str(image), noise(8, 8))
    command = [config, checkpoint, str(image), '--out-dir', str(tmp_path), '--cfg-options', option]
    predict_cli(command)
    out = tmp_path / 'metrics.json'
    work = ['--out', str(out), '--work-dir', str(tmp_path / 'work')]
    cli.test([config, checkpoint, *work, '--cfg-options', option])
    assert 0 <= json.loads(out.read_text())['mIoU'] <= 100


def test_prediction_needs_a_config_of_segmentation(trained: Path, tmp_path: Path) -> None:
    cifar10 = SCENES.parents[2] / 'classification/cifar10.py'
    image = tmp_path / 'a.png'
    cv2.imwrite(str(image), noise(8, 8))
    said = r"cifar10\.py' is no config of segmentation: .* 'cifar10'"
    with pytest.raises(SystemExit, match=said):
        predict_cli([str(cifar10), str(trained / 'iter_2.pth'), str(image)])


@pytest.mark.parametrize('tool', ['predict', 'demo', 'train'])
def test_without_mmsegmentation_it_says_what_to_install(
    tool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith('vqmoe_vision.segmentation')]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, 'mmcv', None)
    monkeypatch.setattr(sys, 'argv', [tool, str(SCENES)])
    path = SCENES.parents[3] / f'tools/{tool}.py'
    with pytest.raises(SystemExit, match=r"^error: .* pip install '\.\[seg.*\]'$"):
        runpy.run_path(str(path), run_name='__main__')


def test_options_that_a_config_lacks(trained: Path, tmp_path: Path) -> None:
    cifar10 = SCENES.parents[2] / 'classification/cifar10.py'
    for option, message in (
        (['--show-dir', str(tmp_path)], 'visualization'),
        (['--tta'], 'tta_pipeline'),
    ):
        with pytest.raises(SystemExit, match=message):
            cli.test([str(cifar10), str(trained / 'iter_2.pth'), *option])


def test_model_with_other_classes_than_the_data(config: str, tmp_path: Path) -> None:
    option = 'model.decode_head.num_classes=4'
    with pytest.raises(SystemExit, match=r'num_classes=4, but the data set has 11 classes'):
        cli.train([config, '--work-dir', str(tmp_path / 'w'), '--cfg-options', option])
