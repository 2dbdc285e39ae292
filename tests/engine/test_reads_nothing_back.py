"""Three training steps on the meta device, which has no values and raises where one is read.

A step is what a loop's `run_iter` does: hooks, loss, gradient clipping and the optimizer. What meta
would hide `Watch` refuses, but for the batch on its way to the device.
"""

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn

from vqmoe_vision.engine.cli import load_config
from vqmoe_vision.engine.model import unwrapped
from vqmoe_vision.moe import METHODS, use_kernel

from .. import mostly_long
from ..rows import CONFIGS, DIGITS, SCENES
from ..runs import leave_dense
from ..watch import Watch

IMAGENET = 'classification/imagenet/vit_tiny_vqmoe_imagenet.py'
SMALL = {'depth': 2, 'embed_dim': 16, 'num_heads': 2, 'patch_size': 8, 'img_size': 48}
# of images and classes of the data
OF: dict[str, dict[str, Any]] = {
    DIGITS: {'model.num_classes': 10},
    SCENES: {'model.decode_head.num_classes': 11, 'model.data_preprocessor.size': (48, 48)},
}
LOADER = {'batch_size': 4, 'num_workers': 0, 'persistent_workers': False}


class Task(NamedTuple):
    leaf: str
    data: str  # the config whose images it sees: they come with a library
    options: dict[str, Any] = {}  # noqa: RUF012

    @property
    def model(self) -> str:
        return 'model' if self.data == DIGITS else 'model.backbone'

    def options_of(self, model_name: str, moe: dict[str, Any] | None) -> dict[str, Any]:
        """Those of a small model for the images and classes of the data."""
        shape = {**SMALL, 'model_name': model_name, 'moe': moe}
        return {f'{self.model}.{n}': v for n, v in shape.items()} | OF[self.data] | self.options


UPERNET = 'segmentation/ade20k/upernet_vit-b-vqmoe_mln_8xb2-160k_ade20k-512x512.py'
LEVELS = {'model.backbone.depth': 4, 'model.backbone.out_indices': (0, 1, 2, 3)}
NARROW = dict.fromkeys(('model.decode_head.channels', 'model.auxiliary_head.channels'), 16)
TASKS = {
    'classification': Task(DIGITS, DIGITS),
    # ImageNet's config draws one or the other in each step
    'mixup': Task(IMAGENET, DIGITS, {'model.mixup.switch_prob': 0.0}),
    'cutmix': Task(IMAGENET, DIGITS, {'model.mixup.switch_prob': 1.0}),
    'segmentation': Task(SCENES, SCENES),
    'upernet': Task(UPERNET, SCENES, LEVELS | NARROW),
}
# what comparisons add; a line of the log is due after ten steps or more
HOOKS = {
    'default_hooks.routing_history.type': 'RoutingHistoryHook',
    'default_hooks.run_record.type': 'RunRecordHook',
}
STEPS = 3


class Done(Exception):
    """The steps are over."""


class WatchStep(Watch):
    """As `Watch`, but the data preprocessor may copy without a wait: a batch starts on the host."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._arriving = False
        turn = partial(setattr, self, '_arriving')
        model.data_preprocessor.register_forward_pre_hook(lambda *_: turn(True))
        model.data_preprocessor.register_forward_hook(lambda *_: turn(False))

    def may_copy(self, func: Any, kwargs: dict[str, Any]) -> bool:
        copies = func is torch.ops.aten._to_copy.default and kwargs.get('non_blocking', False)
        return super().may_copy(func, kwargs) or (self._arriving and copies)


class OnMeta(Hook):
    """Moves model and optimizer to the meta device before the first step, and ends after some."""

    def __init__(self, kernels: ExitStack) -> None:
        self.kernels = kernels

    def before_train(self, runner: Runner) -> None:
        # not before: the model has been counted by then, on the CPU in float32
        self.kernels.enter_context(use_kernel('grouped_mm'))
        model = unwrapped(runner)
        names = {parameter: name for name, parameter in model.named_parameters()}
        model.to('meta', torch.bfloat16)
        moved = dict(model.named_parameters())
        for group in runner.optim_wrapper.optimizer.param_groups:
            group['params'] = [moved[names[parameter]] for parameter in group['params']]
        # what autocast would do, which the meta device has not
        model.routed_model.patch_embed.register_forward_pre_hook(lambda _, x: x[0].bfloat16())
        step, watch = runner.train_loop.run_iter, WatchStep(runner.model)

        def watched(*args: Any) -> None:
            with watch:
                step(*args)

        runner.train_loop.run_iter = watched

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        if runner.iter + 1 == STEPS:
            raise Done


def runner_of(folder: Path, name: str, method: str) -> Runner:
    task, moe = TASKS[name], {'_delete_': True, 'preset': 'matched'}
    features = {}
    if METHODS[method].needs_features:
        moe['num_clusters'] = 4
        shape = task.options_of('vit_tiny_patch16_224', None)
        file = leave_dense(folder / 'dense.pth', str(CONFIGS / task.leaf), task.model, shape)
        features = {f'{task.model}.features': file}
    options = task.options_of(f'vit_tiny_{method}', moe)
    config = load_config(str(CONFIGS / task.leaf), {**options, **features, **HOOKS})
    loader = LOADER | ({'dataset.num_scenes': 16} if task.data == SCENES else {})
    given = {f'train_dataloader.{key}': value for key, value in loader.items()}
    config.train_dataloader = load_config(str(CONFIGS / task.data), given).train_dataloader
    config.val_cfg = config.val_dataloader = config.val_evaluator = None
    config.work_dir, config.experiment_name = str(folder), folder.name
    return Runner.from_cfg(config)


@pytest.mark.parametrize('task', mostly_long(TASKS, *(name for name in TASKS if name != 'cutmix')))
@pytest.mark.parametrize('method', mostly_long(METHODS, 'vqmoe'))
def test_a_training_step_reads_nothing_back(tmp_path, task, method):
    runner = runner_of(tmp_path, task, method)
    with ExitStack() as kernels, pytest.raises(Done):
        runner.register_hook(OnMeta(kernels), priority='LOWEST')
        runner.train()
