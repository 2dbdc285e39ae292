"""Three training steps on the meta device, which has no values and raises where one is read.

A step is what a loop's `run_iter` does: hooks, loss, gradient clipping and the optimizer. What meta
would hide `Watch` refuses, but for the batch on its way to the device.
"""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch import Tensor, nn

from vqmoe_vision.engine.cli import load_config
from vqmoe_vision.engine.model import unwrapped
from vqmoe_vision.engine.trained import scope_of
from vqmoe_vision.moe import METHODS, use_kernel

from ..rows import CONFIGS
from ..watch import RAISED, READS, Watch

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


class WatchStep(Watch):
    """As `Watch`, but the data preprocessor may copy without a wait: a batch starts on the host.

    Args:
        model: In training, with the preprocessor.
    """

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


def runner_of(folder: Path, task: str, method: str) -> Runner:
    field, leaf, _ = TASKS[task]
    sizes = {'depth': 2, 'embed_dim': 16, 'num_heads': 2, 'model_name': f'vit_tiny_{method}'}
    options = {f'{field}.{name}': value for name, value in sizes.items()}
    loader = {'batch_size': 4, 'num_workers': 0, 'persistent_workers': False}
    options |= {f'train_dataloader.{name}': value for name, value in loader.items()}
    if task == 'segmentation':
        options['train_dataloader.dataset.num_scenes'] = 16
    if METHODS[method].needs_features:
        options[f'{field}.moe'] = {'num_clusters': 4}
        options[f'{field}.features'] = dense_checkpoint(folder, str(CONFIGS / leaf), field, options)
    config = load_config(str(CONFIGS / leaf), {**options, **HOOKS})
    for name in ('val_cfg', 'val_dataloader', 'val_evaluator'):
        config[name] = None
    config.work_dir, config.experiment_name = str(folder), folder.name
    return Runner.from_cfg(config)


def dense_checkpoint(folder: Path, leaf: str, field: str, options: dict[str, Any]) -> str:
    """The weights of a dense model of the same shape, by whose features images are clustered."""
    dense = {f'{field}.model_name': 'vit_tiny_patch16_224', f'{field}.moe': None}
    config = load_config(leaf, {**options, **dense})
    with scope_of(config):
        state = MODELS.build(config.model).state_dict()
    torch.save({'state_dict': state}, folder / 'dense.pth')
    return str(folder / 'dense.pth')


def train(runner: Runner) -> None:
    with ExitStack() as kernels:
        runner.register_hook(OnMeta(kernels), priority='LOWEST')
        runner.train()


@pytest.mark.parametrize('task', TASKS)
@pytest.mark.parametrize(
    'method',
    [pytest.param(name, marks=[pytest.mark.long] * (name != 'vqmoe')) for name in METHODS],
)
def test_a_training_step_reads_nothing_back(tmp_path: Path, task: str, method: str) -> None:
    with pytest.raises(Done):
        train(runner_of(tmp_path, task, method))


# --- the test sees what it is for


@pytest.mark.parametrize('task', TASKS)
def test_one_value_that_is_read_is_found(tmp_path: Path, task: str) -> None:
    runner = runner_of(tmp_path, task, 'smoe')
    loss = unwrapped(runner).get_submodule(TASKS[task][2])
    loss.register_forward_hook(lambda module, given, value: value * (value.item() < 9))
    with pytest.raises(RuntimeError, match=r'item\(\) cannot be called on meta'):
        train(runner)


def copy_unasked(weight: Tensor) -> Tensor:
    """Without a wait, but of what is no batch."""
    return torch.tensor([1.0]).to(weight.device, non_blocking=True)


@pytest.mark.parametrize(
    ('moment', 'read'),
    [
        *(pytest.param('after_train_iter', read, id=name) for name, read in READS.items()),
        pytest.param('after_train_iter', copy_unasked, id='copy without a wait'),
        pytest.param('before_train_iter', READS['item'], id='before the step'),
    ],
)
def test_a_read_in_a_hook_is_found(tmp_path: Path, moment: str, read: Callable) -> None:
    reached = []

    def look(runner: Runner, *args: Any, **kwargs: Any) -> None:
        reached.append(moment)
        read(next(runner.model.parameters()).detach())

    runner, hook = runner_of(tmp_path, 'classification', 'smoe'), Hook()
    setattr(hook, moment, look)
    runner.register_hook(hook)
    with pytest.raises(RAISED):
        train(runner)
    assert reached == [moment]


@pytest.mark.parametrize('task', TASKS)
def test_a_batch_that_is_waited_for_is_found(tmp_path: Path, task: str) -> None:
    runner = runner_of(tmp_path, task, 'smoe')
    runner.model.data_preprocessor._non_blocking = False
    with pytest.raises(AssertionError, match=r'_to_copy\.default copies from the host'):
        train(runner)
