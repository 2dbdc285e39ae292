"""Importing the package changes nothing for anybody; our tools take our types for stock ones."""

import subprocess
import sys

import cv2
import numpy as np
import pytest
from mmengine.config import Config

from vqmoe_vision.engine.checkpoint import read_state
from vqmoe_vision.engine.config import take_ours

from .forked import run_tool
from .rows import CONFIGS, leaves
from .runs import messages
from .soak.kinds import same

PROGRAM = """
import gc, importlib.util, pkgutil, sys, warnings
gc.disable()
warnings.simplefilter('ignore')
import mmengine, mmcv.transforms, mmseg.apis, mmseg.datasets, mmseg.models, mmseg.evaluation
import mmengine.dataset, mmengine.runner, mmseg.engine, mmseg.visualization, timm, timm.task
import torch
from mmengine import registry
from mmseg import registry as of_mmseg
from torch.optim import optimizer as optimizers

def names():
    found = {}
    for module in (registry, of_mmseg):
        for key, value in vars(module).items():
            if isinstance(value, registry.Registry):
                value.import_from_location()
                kinds = value.module_dict.items()
                found |= {(value.scope, key, name): kind for name, kind in kinds}
    return found

THEIRS = ('mmengine', 'mmcv', 'mmseg', 'timm', 'torch.optim')
# checkpoints are read as data where our tasks are imported: docs/explanation/reliability.md
EXCEPT = ('mmengine.runner.checkpoint',)

def functions():
    found = {}
    for where, module in sorted(sys.modules.items()):
        if not where.startswith(THEIRS) or where.startswith(EXCEPT):
            continue
        for name, value in vars(module).items():
            if callable(value) and str(getattr(value, '__module__', '')).startswith(THEIRS):
                found[where, name] = value
                if isinstance(value, type) and value.__module__ == where:
                    own = vars(value).items()
                    found |= {(where, name, n): v for n, v in own if not n.startswith('_abc')}
    return found

before, theirs = names(), functions()
import vqmoe_vision
for module in pkgutil.walk_packages(vqmoe_vision.__path__, 'vqmoe_vision.'):
    name = module.name.rpartition('.')[2]
    if name != '__main__' and (name != 'triton' or importlib.util.find_spec(name)):
        importlib.import_module(module.name)
after, ours = names(), functions()
taken = [key for key, kind in before.items() if after[key] is not kind]
new = [key for key in after if key not in before]
patched = [key for key, value in theirs.items() if ours.get(key) is not value
           and not value.__module__.startswith(EXCEPT)]
foreign = [key for key in new if not after[key].__module__.startswith(('vqmoe_vision', *THEIRS))]
assert any(name == 'AtomicCheckpointHook' for *_, name in new), new
assert not taken, taken
assert not patched, patched
assert not foreign, foreign
assert not optimizers._global_optimizer_pre_hooks and not optimizers._global_optimizer_post_hooks
"""


def test_every_stock_name_is_stock_and_no_function_is_patched():
    done = subprocess.run([sys.executable, '-c', PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('leaf', leaves('classification') + leaves('segmentation'))
def test_our_configs_name_our_types(leaf):
    config = Config.fromfile(CONFIGS / leaf)
    known = config.copy()
    assert take_ours(known) == '' and known.to_dict() == config.to_dict()


# as mmseg's own configs are written: nothing of ours in it
STOCK = """
default_scope = 'mmseg'
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor', mean=[127.5] * 3, std=[127.5] * 3, bgr_to_rgb=True,
        size=(32, 32), pad_val=0, seg_pad_val=255),
    backbone=dict(type='UNet', base_channels=4, num_stages=2, strides=(1, 1),
        enc_num_convs=(1, 1), dec_num_convs=(1,), downsamples=(True,),
        enc_dilations=(1, 1), dec_dilations=(1,)),
    decode_head=dict(type='FCNHead', in_channels=4, channels=4, num_convs=1, in_index=1,
        num_classes=3, dropout_ratio=0.5, loss_decode=dict(type='CrossEntropyLoss')),
    train_cfg=dict(), test_cfg=dict(mode='whole'))
load = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]
dataset = dict(
    type='BaseSegDataset', data_root=ROOT, img_suffix='.png',
    metainfo=dict(classes=('a', 'b', 'c'), palette=[[0, 0, 0], [9, 9, 9], [99, 99, 99]]),
    data_prefix=dict(img_path='images', seg_map_path='labels'),
    pipeline=[*load, dict(type='RandomCrop', crop_size=(32, 32)),
              dict(type='RandomFlip', prob=0.5), dict(type='PhotoMetricDistortion'),
              dict(type='PackSegInputs')])
train_dataloader = dict(batch_size=2, num_workers=WORKERS,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(type='RepeatDataset', times=2, dataset=dataset))
val_dataloader = dict(batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler'),
    dataset=dict(dataset, pipeline=[*load, dict(type='PackSegInputs')]))
train_cfg = dict(type='IterBasedTrainLoop', max_iters=4, val_interval=4)
val_cfg = dict(type='ValLoop')
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1, momentum=0.9))
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=1),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=2))
log_processor = dict(by_epoch=False)
randomness = dict(seed=3)
"""


@pytest.mark.filterwarnings('ignore::UserWarning')  # mmseg's, of losses and heads
@pytest.mark.parametrize('workers', [0, 2])
def test_a_stock_config_of_mmseg_resumes_to_the_bit_under_our_train(workers, tmp_path):
    random = np.random.default_rng(0)
    for kind, high, channels in (('images', 256, (3,)), ('labels', 3, ())):
        (tmp_path / kind).mkdir()
        for i in range(5):
            pixels = random.integers(0, high, (40, 48, *channels), np.uint8)
            cv2.imwrite(str(tmp_path / kind / f'{i}.png'), pixels)
    config = tmp_path / f'stock{workers}.py'
    config.write_text(STOCK.replace('ROOT', repr(str(tmp_path))).replace('WORKERS', str(workers)))
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    short = ('--cfg-options', 'train_cfg.max_iters=2')
    for work, more in ((whole, ()), (parts, short), (parts, ('--resume',))):
        # by processes of their own: who goes on in one with workers waits for them to end
        done = run_tool('train.py', config.name, '--work-dir', str(work), *more, folder=tmp_path)
        assert done.returncode == 0, done.stderr
    assert same(*(read_state(str(folder / 'iter_4.pth')) for folder in (whole, parts)))
    (told,) = (line for line in messages(whole) if 'so that this run goes on' in line)
    for name in ('AtomicCheckpointHook', 'LoadImage', 'SeededInfiniteSampler', 'ReseedHook'):
        assert name in told


@pytest.mark.parametrize('options', [{}, {'checkpoint': None}])
def test_what_a_config_leaves_to_mmengine_is_ours_too(options):
    config = Config(dict(train_cfg=dict(by_epoch=True, max_epochs=2), default_hooks=options))
    config.custom_hooks = [dict(type='mmengine.CheckpointHook', interval=5)]
    assert 'ResumableEpochLoop for EpochBasedTrainLoop' in take_ours(config)
    assert config.custom_hooks[0].to_dict() == dict(type='AtomicCheckpointHook', interval=5)
    assert config.train_cfg.to_dict() == dict(type='ResumableEpochLoop', max_epochs=2)
    kept = config.default_hooks.checkpoint
    assert kept is None if options else kept.type == 'AtomicCheckpointHook'
    assert config.default_hooks.runtime_info.type == 'StepValuesHook'
    assert take_ours(config) == ''
