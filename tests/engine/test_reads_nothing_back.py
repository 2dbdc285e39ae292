"""Three training steps on the meta device, which has no values and raises where one is read.

A step is what a loop's `run_iter` does: hooks, loss, gradient clipping and the optimizer.
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner

from vqmoe_vision.engine.cli import load_config
from vqmoe_vision.engine.model import unwrapped
from vqmoe_vision.moe import METHODS, use_kernel

from ..rows import CONFIGS

# field of the timm model, the config, and the module that computes the loss
TASKS = {
    'classification': (
        'model',
        'classification/digits/demo/vit_tiny_vqmoe_demo.py',
        'criterion',
    ),
    'segmentation': (
        'model.backbone',
        'segmentation/digit_scenes/segmenter_vit_tiny_vqmoe_digit_scenes.py',
        'decode_head.loss_decode',
    ),
}
# what comparisons add; a line of the log is due after ten steps or more
HOOKS = {
    'default_hooks.routing_history.type': 'RoutingHistoryHook',
    'default_hooks.run_record.type': 'RunRecordHook',
}
STEPS = 3


class Done(Exception):
    """The steps are over."""


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

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        if runner.iter + 1 == STEPS:
            raise Done


def runner_of(folder: Path, task: str, model_name: str) -> Runner:
    field, leaf, _ = TASKS[task]
    sizes = {'depth': 2, 'embed_dim': 16, 'num_heads': 2, 'model_name': model_name}
    options = {f'{field}.{name}': value for name, value in sizes.items()}
    loader = {'batch_size': 4, 'num_workers': 0, 'persistent_workers': False}
    options |= {f'train_dataloader.{name}': value for name, value in loader.items()}
    if task == 'segmentation':
        options['train_dataloader.dataset.num_scenes'] = 16
    config = load_config(str(CONFIGS / leaf), {**options, **HOOKS})
    for name in ('val_cfg', 'val_dataloader', 'val_evaluator'):
        config[name] = None
    config.work_dir, config.experiment_name = str(folder), folder.name
    return Runner.from_cfg(config)


def train(runner: Runner) -> None:
    with ExitStack() as kernels:
        runner.register_hook(OnMeta(kernels), priority='LOWEST')
        runner.train()


@pytest.mark.parametrize('task', TASKS)
@pytest.mark.parametrize(
    'method',
    [
        pytest.param(name, marks=[pytest.mark.long] * (name != 'vqmoe'))
        for name, method in METHODS.items()
        if not method.needs_features  # which somebody would have to train first
    ],
)
def test_a_training_step_reads_nothing_back(tmp_path: Path, task: str, method: str) -> None:
    with pytest.raises(Done):
        train(runner_of(tmp_path, task, f'vit_tiny_{method}'))


@pytest.mark.parametrize('task', TASKS)
def test_one_value_that_is_read_is_found(tmp_path: Path, task: str) -> None:
    runner = runner_of(tmp_path, task, 'vit_tiny_smoe')
    loss = unwrapped(runner).get_submodule(TASKS[task][2])
    loss.register_forward_hook(lambda module, given, value: value * (value.item() < 9))
    with pytest.raises(RuntimeError, match=r'item\(\) cannot be called on meta'):
        train(runner)
