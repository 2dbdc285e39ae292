"""Values that stay on the device, on a CPU that is taken for one whose values cost a wait."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.runner import Runner

from vqmoe_vision.engine import step_values
from vqmoe_vision.engine.checkpoint import read_content
from vqmoe_vision.engine.step_values import NonFiniteError, check_losses

from .. import cases
from .tiny import NO_VALIDATION, config_of


def runner_of(folder: Path, **options: Any) -> Runner:
    smoe = {'model.model_name': 'vit_tiny_smoe', 'train_cfg.max_epochs': 1}
    return Runner.from_cfg(config_of(folder, **smoe, **NO_VALIDATION, **options))


@pytest.fixture
def on_device(monkeypatch) -> None:
    monkeypatch.setattr(step_values, 'READ_AT_ONCE', set())


def lines(folder: Path) -> list[dict[str, Any]]:
    text = next(folder.glob('*/vis_data/scalars.json')).read_text()
    read = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in line.items() if 'time' not in k} for line in read]


def scalars(file: Path) -> dict[str, list]:
    buffers = read_content(str(file))['message_hub']['log_scalars']
    assert {type(buffer) for buffer in buffers.values()} == {HistoryBuffer}
    arrays = {name: buffer.data for name, buffer in buffers.items() if 'time' not in name}
    return {n: [(a.dtype, a.tolist()) for a in both] for n, both in arrays.items()}


@pytest.mark.filterwarnings('ignore:Detected call of `scheduler.step')  # the first batch waits
@pytest.mark.usefixtures('on_device')
def test_logs_and_checkpoints_are_those_of_mmengines_hook(tmp_path):
    options = {
        'default_hooks.logger.interval': 4,
        'optim_wrapper.accumulative_counts': 2,  # a norm at every second iteration
        'default_hooks.record.type': 'RunRecordHook',
    }
    theirs = {'default_hooks.runtime_info.type': 'RuntimeInfoHook'}
    for name, hook in (('ours', {}), ('theirs', theirs)):
        runner_of(tmp_path / name, **options, **hook).train()
    logged = lines(tmp_path / 'ours')
    assert logged == lines(tmp_path / 'theirs')
    assert [list(line) for line in logged] == [list(line) for line in lines(tmp_path / 'theirs')]
    assert 'grad_norm' in logged[0] and 'blocks.1.mlp/importance_loss' in logged[0]
    ours, theirs = (scalars(tmp_path / name / 'epoch_1.pth') for name in ('ours', 'theirs'))
    assert ours == theirs and len(ours['train/loss'][0][1]) == 10
    records = [json.loads((tmp_path / n / 'run.json').read_text()) for n in ('ours', 'theirs')]
    assert records[0]['first_losses'] == records[1]['first_losses']


class Spoil(Hook):
    """Makes a weight nan before an iteration, or what its gradient will be."""

    priority = 'LOW'

    def __init__(self, iteration: int, gradient: bool) -> None:
        self.iteration, self.gradient = iteration, gradient
        self.begun = 0

    def before_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        self.begun = runner.iter + 1
        weight = runner.model.model.head.weight
        if self.begun == self.iteration and self.gradient:
            weight.register_hook(lambda gradient: gradient * torch.nan)
        elif self.begun == self.iteration:
            weight.data.fill_(torch.nan)


EACH_3 = {'default_hooks.checkpoint.by_epoch': False, 'default_hooks.checkpoint.interval': 3}
LOSS, WEIGHT = r'cross_entropy became nan', r'parameter \S+ became nan or infinite'


@cases(
    'options, gradient, message, noticed',
    ({'default_hooks.logger.interval': 6}, False, LOSS, 6),
    ({'default_hooks.logger.interval': 50, **EACH_3}, False, LOSS, 6),
    ({'default_hooks.logger.interval': 50}, False, LOSS, 8),  # LONGEST
    ({'default_hooks.logger.interval': 6}, True, WEIGHT, 6),
    ids=['line', 'checkpoint', 'longest', 'gradient'],
)
@pytest.mark.usefixtures('on_device')
def test_a_later_look_names_the_iteration_and_saves_nothing(
    tmp_path,
    monkeypatch,
    options,
    gradient,
    message,
    noticed,
):
    monkeypatch.setattr(step_values, 'LONGEST', 8)
    runner = runner_of(tmp_path / 'run', **options)
    spoil = Spoil(4, gradient)
    runner.register_hook(spoil)
    with pytest.raises(NonFiniteError, match=rf'^{message} at iteration 4[; ]'):
        runner.train()
    assert spoil.begun == noticed
    kept = {'iter_3.pth'} if 'default_hooks.checkpoint.by_epoch' in options else set()
    assert {path.name for path in (tmp_path / 'run').glob('*.pth')} == kept
    written = list((tmp_path / 'run').glob('*/vis_data/scalars.json'))
    assert not any('NaN' in path.read_text() for path in written)


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_loss_that_is_not_finite_names_layer_component_and_iteration(value):
    losses = {'loss': value, 'a/vq_loss': 0.1, 'b/balance_loss': value, 'cross_entropy_loss': value}
    with pytest.raises(NonFiniteError, match=r'^b/balance became \w+ at iteration 120;'):
        check_losses(losses, 120)
