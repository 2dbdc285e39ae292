"""mmsegmentation's own entry points, unmodified, on a config of ours."""

import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import mmseg
import numpy as np
import pytest
import torch
from matplotlib import pyplot
from mmengine.config import Config
from mmseg.apis import MMSegInferencer, inference_model, init_model, show_result_pyplot

from vqmoe_vision.engine.publish import publish_checkpoint
from vqmoe_vision.segmentation import predict

from ..runs import train
from .test_cli import write_config

TOOLS = Path(mmseg.__file__).parent / '.mim' / 'tools'
# theirs: of a temporary folder, of a visualizer without one, of classes that no scene shows
pytestmark = [
    pytest.mark.filterwarnings('ignore:Implicitly cleaning up:ResourceWarning'),
    pytest.mark.filterwarnings('ignore::UserWarning:mmengine'),
    pytest.mark.filterwarnings('ignore:invalid value encountered in divide:RuntimeWarning'),
]


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> tuple[str, str, Path]:
    """Config, checkpoint, and work dir of a run of two iterations that draws its validation."""
    folder = tmp_path_factory.mktemp('trained')
    config = write_config(folder, 'trained_for_tools')
    draw = [f'default_hooks.visualization.{option}' for option in ('draw=True', 'interval=1')]
    run = train(config, folder / 'run', *draw)
    return config, str(run / 'iter_2.pth'), run


@pytest.fixture
def run_tool(monkeypatch) -> Callable[..., None]:
    def run(name: str, *arguments: Any) -> None:
        monkeypatch.setattr('sys.argv', [name, *map(str, arguments)])
        runpy.run_path(str(TOOLS / name), run_name='__main__')

    monkeypatch.setattr(pyplot, 'show', lambda: None)
    matplotlib.use('Agg')
    return run


def test_inference_by_mmsegs_functions_and_inferencer(trained, tmp_path):
    config, checkpoint, _ = trained
    image, array = str(tmp_path / 'photo.png'), np.random.randint(0, 256, (40, 60, 3), np.uint8)
    cv2.imwrite(image, array)
    (expected,) = predict(config, checkpoint, image)
    published = publish_checkpoint(checkpoint, str(tmp_path / 'scenes.pth'))
    model = init_model(config, str(published), device='cpu')
    result = inference_model(model, image)
    for one in (result, *inference_model(model, [array, array])):
        assert (one.pred_sem_seg.data[0].numpy() == expected.labels).all()
    drawn = show_result_pyplot(model, image, result, show=False, out_file=f'{image}.png')
    assert drawn.shape == (40, 60, 3)
    inferencer = MMSegInferencer(config, checkpoint, device='cpu')
    found = inferencer(image, out_dir=str(tmp_path / 'out'), return_vis=True)
    assert (found['predictions'] == expected.labels).all()
    assert found['visualization'].shape == (40, 60, 3)
    written = cv2.imread(str(tmp_path / 'out/pred/00000000_pred.png'), cv2.IMREAD_UNCHANGED)
    assert (written == expected.labels).all()
    assert len(inferencer([array, array], batch_size=2)['predictions']) == 2


RUNNER = """
default_scope = 'mmseg'
model = dict(type='EncoderDecoder',
    decode_head=dict(type='FCNHead', in_channels=3, channels=3, num_classes=2),
    backbone=dict(
        type='mmengine.runner.Runner', model=dict(type='mmengine.model.ImgDataPreprocessor'),
        work_dir=THEIRS, experiment_name=THEIRS, default_hooks=None))
"""


@pytest.mark.parametrize('where', ['meta', 'message_hub'])
def test_no_checkpoint_builds_what_its_config_names(where, tmp_path):
    """A backbone that is a Runner writes into any folder."""
    theirs, weights = tmp_path / 'theirs', str(tmp_path / 'a.pth')
    config = RUNNER.replace('THEIRS', repr(str(theirs)))
    said = {'cfg': config} if where == 'meta' else {'runtime_info': {'cfg': config}}
    torch.save({'state_dict': {}, 'meta': {}, where: said}, weights)
    with pytest.raises(ValueError, match='Cannot find the config in the checkpoint'):
        MMSegInferencer(model=None, weights=weights, device='cpu')
    assert not theirs.exists()


def test_pictures_of_validation_and_of_browse_dataset(trained, run_tool, tmp_path):
    run_tool('analysis_tools/browse_dataset.py', trained[0], '--output-dir', tmp_path, '--not-show')
    # of validation the first of each batch: three scenes in batches of two, from iteration 2 on
    for folder, pattern, names, shape in (
        (tmp_path, '*.png', [f'train_0000{i}' for i in range(4)], (48, 48, 3)),
        (trained[2], '*/*/*/val_*.png', ['val_dev_00000_2', 'val_dev_00002_3'], (96, 192, 3)),
    ):
        found = sorted(folder.glob(pattern))
        assert [path.stem for path in found] == names
        assert cv2.imread(str(found[0])).shape == shape


@pytest.mark.filterwarnings('ignore::UserWarning')  # of paths that its script sets aside
def test_train_resumes(trained, run_tool, tmp_path, monkeypatch):
    work = tmp_path / 'moved'
    shutil.copytree(trained[2], work, ignore=shutil.ignore_patterns('*.log'))
    monkeypatch.chdir(tmp_path)  # from any folder
    options = ['--cfg-options', 'experiment_name=train_resumes', 'train_cfg.max_iters=4']
    options.append('total_batch_size=64')  # which it does not know
    run_tool('train.py', trained[0], '--work-dir', work, '--resume', *options)
    assert (work / 'last_checkpoint').read_text() == 'iter_4.pth'
    (text,) = (log.read_text() for log in work.glob('*/*.log'))
    assert 'resumed epoch: 0, iter: 2' in text
    assert 'Iter(train) [3/4]' in text and 'Iter(train) [1/4]' not in text
    # a process has the batch that the config states
    stated = Config.fromfile(trained[0]).train_dataloader.batch_size
    assert Config.fromfile(work / Path(trained[0]).name).train_dataloader.batch_size == stated


def test_confusion_matrix(trained, run_tool, tmp_path, monkeypatch):
    config, checkpoint, _ = trained
    labels, drawn = tmp_path / 'labels', tmp_path / 'drawn'
    options = ['--out', labels, '--cfg-options', f'experiment_name={tmp_path.name}']
    run_tool('test.py', config, checkpoint, '--work-dir', tmp_path / 'run', *options)
    monkeypatch.setitem(matplotlib.rcParams, 'savefig.dpi', 10)
    run_tool('analysis_tools/confusion_matrix.py', config, labels, drawn)
    assert (tmp_path / 'drawn/confusion_matrix.png').is_file()
    pyplot.close('all')
