"""A metric that no validation reports is refused before the training."""

from pathlib import Path
from typing import Any

import pytest
from mmengine.evaluator import Evaluator
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner, ValLoop

from vqmoe_vision.engine.cli import load_config
from vqmoe_vision.engine.reported import check_reported

from .test_cli import TINY

ABSENT = 'accuracy/top3'
CHOOSING = [
    ('save_best', dict(type='CheckpointHook', save_best=['accuracy/top1', ABSENT])),
    ('EarlyStoppingHook.monitor', dict(type='EarlyStoppingHook', monitor=ABSENT, rule='greater')),
]


class _Adds(Hook):
    """Of a user, with a metric of its own."""

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        assert metrics is not None
        metrics['own'] = 1.0


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    path = tmp_path / 'tiny.py'
    path.write_text(TINY.replace('NAME', repr(tmp_path.name)))
    config = load_config(str(path))
    config.work_dir = str(tmp_path / 'run')
    return Runner.from_cfg(config)


def test_what_is_chosen_by_has_to_be_reported(runner: Runner) -> None:
    runner._train_loop = runner.build_train_loop(runner._train_loop)
    names = 'accuracy/balanced, accuracy/head, accuracy/medium, accuracy/tail, accuracy/top1, '
    for field, config in CHOOSING:
        hook: Any = HOOKS.build(config)
        with pytest.raises(ValueError) as caught:
            hook.before_train(runner)
        allowed = f'what val_evaluator reports, which is {names}accuracy/top5'
        assert str(caught.value) == f'{field}={ABSENT!r} is not possible: {allowed}'


def test_what_may_be_reported_is_left_to_the_validation(runner: Runner) -> None:
    check_reported(runner, 'metric', 'accuracy/top5')
    check_reported(runner, 'metric', 'blocks.1.mlp/load_max')  # of an MoE layer
    with pytest.raises(ValueError, match=r"^metric='blocks.0.mlp/load_max' is not possible"):
        check_reported(runner, 'metric', 'blocks.0.mlp/load_max')

    class Own(Evaluator):
        """With other names, perhaps."""

    evaluator, loop = runner.val_loop.evaluator, runner.val_loop
    loop.evaluator = Own(evaluator.metrics)
    check_reported(runner, 'metric', ABSENT)
    loop.evaluator, runner._val_loop = evaluator, None
    check_reported(runner, 'metric', ABSENT)

    class OwnLoop(ValLoop):
        """That adds names, perhaps."""

    runner._val_loop = OwnLoop(runner, loop.dataloader, evaluator)
    check_reported(runner, 'metric', ABSENT)
    runner._val_loop = loop
    with pytest.raises(ValueError, match=ABSENT):
        check_reported(runner, 'metric', ABSENT)
    runner.register_hook(_Adds())
    check_reported(runner, 'metric', ABSENT)
