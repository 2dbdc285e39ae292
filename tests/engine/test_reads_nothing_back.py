"""Three training steps on the meta device, which has no values and raises where one is read.

A step is what a loop's `run_iter` does: hooks, loss, gradient clipping and the optimizer.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

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
HOOKS_OF_RUN = {
    'default_hooks.to_meta.type': 'ToMetaHook',
    'default_hooks.routing_history.type': 'RoutingHistoryHook',
    'default_hooks.run_record.type': 'RunRecordHook',
}
STEPS = 3


class Done(Exception):
    """The steps are over."""


@HOOKS.register_module()
class ToMetaHook(Hook):
    """Moves model and optimizer to the meta device before the first step, and ends after some."""

    priority = 'LOWEST'

    def before_train(self, runner: Runner) -> None:
        model = unwrapped(runner)
        names = {parameter: name for name, parameter in model.named_parameters()}
        model.to('meta', torch.bfloat16)
        moved = dict(model.named_parameters())
        for group in runner.optim_wrapper.optimizer.param_groups:
            group['params'] = [moved[names[parameter]] for parameter in group['params']]
        use_kernel('grouped_mm').__enter__()  # of the counts before the training, none can be
        # what autocast would do, which the meta device has not
        model.routed_model.patch_embed.register_forward_pre_hook(lambda _, x: x[0].bfloat16())

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        if runner.iter + 1 == STEPS:
            raise Done


def run(
    folder: Path,
    task: str,
    method: str | None,
    change: Callable[[nn.Module], None] = lambda model: None,
) -> None:
    """Trains, with every hook of the config and those of comparisons."""
    field, leaf, _ = TASKS[task]
    name = 'test_vit' if method is None else f'vit_tiny_{method}'
    sizes = {'depth': 2, 'embed_dim': 16, 'num_heads': 2, 'model_name': name}
    options = {f'{field}.{name}': value for name, value in sizes.items()}
    options |= {'train_dataloader.batch_size': 4, **HOOKS_OF_RUN}
    if task == 'segmentation':
        options |= {
            'train_dataloader.num_workers': 0,
            'train_dataloader.persistent_workers': False,
            'train_dataloader.dataset.num_scenes': 16,
        }
    config = load_config(str(CONFIGS / leaf), options)
    for name in ('val_cfg', 'val_dataloader', 'val_evaluator'):
        config[name] = None
    config.work_dir, config.experiment_name = str(folder), folder.name
    runner = Runner.from_cfg(config)
    change(unwrapped(runner))
    with pytest.raises(Done):
        runner.train()


@pytest.mark.parametrize('task', TASKS)
@pytest.mark.parametrize('method', METHODS)
def test_a_training_step_reads_nothing_back(tmp_path: Path, task: str, method: str) -> None:
    run(tmp_path, task, method)
