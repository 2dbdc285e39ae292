"""Three training steps on the meta device, which has no values and raises where one is read.

A step is what a loop's `run_iter` does: hooks, loss, gradient clipping and the optimizer. What meta
would hide `Watch` refuses, but for the batch on its way to the device.
"""

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn

from vqmoe_vision.engine.cli import load_config
from vqmoe_vision.engine.model import unwrapped
from vqmoe_vision.moe import METHODS, use_kernel

from .. import mostly_long
from ..rows import CONFIGS
from ..runs import leave_dense
from ..watch import Watch

DIGITS = 'classification/digits/demo/vit_tiny_vqmoe_demo.py'
SCENES = 'segmentation/segmenter_vit-4x96-vqmoe_mask_1xb64-1k_digits-48x48.py'
IMAGENET = 'classification/imagenet/vit_tiny_vqmoe_imagenet.py'
SMALL = {'depth': 2, 'embed_dim': 16, 'num_heads': 2, 'patch_size': 8}
SIZE = 48  # of the images, in pixels
LOADER = {'batch_size': 4, 'num_workers': 0, 'persistent_workers': False}


@dataclass(frozen=True)
class Task:
    leaf: str
    data: str  # the config whose images it sees: they come with a library
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> str:
        return 'model' if self.data == DIGITS else 'model.backbone'

    def options_of(self, model_name: str, moe: dict[str, Any] | None) -> dict[str, Any]:
        """Those of a small model for the images and classes of the data."""
        size, of_data = SIZE, {'model.num_classes': 10}
        if self.data != DIGITS:
            size = SIZE, SIZE
            of_data = {'model.decode_head.num_classes': 11, 'model.data_preprocessor.size': size}
        shape = {**SMALL, 'img_size': size, 'model_name': model_name, 'moe': moe}
        own = {f'{self.model}.{name}': value for name, value in shape.items()}
        return own | of_data | self.options


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
        model.data_preprocessor.register_forward_pre_hook(lambda *_: self._turn(True))
        model.data_preprocessor.register_forward_hook(lambda *_: self._turn(False))

    def _turn(self, arriving: bool) -> None:
        self._arriving = arriving

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
    loader = {f'train_dataloader.{key}': value for key, value in LOADER.items()}
    loader |= {'train_dataloader.dataset.num_scenes': 16} if task.data == SCENES else {}
    config.train_dataloader = load_config(str(CONFIGS / task.data), loader).train_dataloader
    for field_name in ('val_cfg', 'val_dataloader', 'val_evaluator'):
        config[field_name] = None
    config.work_dir, config.experiment_name = str(folder), folder.name
    return Runner.from_cfg(config)


def train(runner: Runner) -> None:
    with ExitStack() as kernels:
        runner.register_hook(OnMeta(kernels), priority='LOWEST')
        runner.train()


@pytest.mark.parametrize('task', mostly_long(TASKS, *(name for name in TASKS if name != 'cutmix')))
@pytest.mark.parametrize('method', mostly_long(METHODS, 'vqmoe'))
def test_a_training_step_reads_nothing_back(tmp_path, task, method):
    with pytest.raises(Done):
        train(runner_of(tmp_path, task, method))
