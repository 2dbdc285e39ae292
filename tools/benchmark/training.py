"""`benchmark.py training`: where a training step of a config goes.

mmengine's own loop runs, with clocks around what it calls. A GPU finishes its work before a clock
is read, so that each part has its own, and a step takes longer than in training. Needs the extra
`train`, and `seg` for configs of segmentation.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial, update_wrapper
from pathlib import Path
from typing import Any, TypeVar

import torch

from vqmoe_vision.moe.config import check

from .environment import describe_machine

PARTS = ('data', 'forward', 'backward', 'optimizer', 'hooks')
WARM_UP = 5  # iterations


class Finished(Exception):
    """Enough iterations have run."""


class StepClock:
    """Adds up, per iteration, the time that a runner spends in some functions."""

    def __init__(self, runner: Any, iterations: int) -> None:
        self.iterations = iterations
        self.steps: list[dict[str, float]] = []
        self._current = dict.fromkeys(('train_step', 'backward', 'optimizer', 'hooks'), 0.0)
        self._began: float | None = None
        self._runner = runner
        runner.call_hook = partial(self._call_hook, runner.call_hook)

    def _wrap(self, owner: Any, name: str, part: str) -> None:
        call = getattr(owner, name)
        # with its attributes, by which a scheduler knows its optimizer's step
        setattr(owner, name, update_wrapper(partial(self._timed, call, part), call))

    def _timed(self, call: Callable, part: str, *args: Any, **kwargs: Any) -> Any:
        begin = _now()
        result = call(*args, **kwargs)
        self._current[part] += _now() - begin
        return result

    def _call_hook(self, call: Callable, name: str, **kwargs: Any) -> None:
        self._timed(call, 'hooks', name, **kwargs)
        if name == 'before_train':  # all is built
            self._wrap(self._runner.model, 'train_step', 'train_step')
            self._wrap(self._runner.optim_wrapper, 'backward', 'backward')
            for method in ('step', 'zero_grad'):
                self._wrap(self._runner.optim_wrapper, method, 'optimizer')
            self._restart()
        if name == 'after_train_iter':  # the last of an iteration
            self._finish()

    def _restart(self) -> None:
        self._began = _now()
        self._current = dict.fromkeys(self._current, 0.0)

    def _finish(self) -> None:
        assert self._began is not None
        spent, whole = self._current, _now() - self._began
        update = spent['backward'] + spent['optimizer']
        # what is left of an iteration is the wait for data; medians leave out a validation between
        parts = {
            'data': whole - spent['train_step'] - spent['hooks'],
            'forward': spent['train_step'] - update,
            'backward': spent['backward'],
            'optimizer': spent['optimizer'],
            'hooks': spent['hooks'],
        }
        self.steps.append({name: seconds * 1e3 for name, seconds in parts.items()})
        if len(self.steps) == WARM_UP + self.iterations:
            raise Finished
        self._restart()


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure_training(config: str, options: Sequence[str], iterations: int) -> dict[str, Any]:
    """Train a config for some iterations, in a folder that is removed."""
    settings = settings_of(config, options)
    with running(settings) as runner:
        clock = StepClock(runner, iterations)
        runner.train()
    measured = measured_of(clock.steps, iterations)
    medians = {part: statistics.median(step[part] for step in measured) for part in PARTS}
    images = settings.train_dataloader.batch_size
    return {'config': config, 'options': list(options), 'images': images, 'parts_ms': medians}


def settings_of(config: str, options: Sequence[str]) -> Any:
    """A config with options."""
    from mmengine.config import DictAction

    from vqmoe_vision.engine.cli import load_config

    values = {}
    for option in options:
        name, equals, value = option.partition('=')
        check(bool(name and equals), '--cfg-options', option, 'name=value')
        values[name] = DictAction._parse_iterable(value)
    return load_config(config, values)


@contextlib.contextmanager
def running(settings: Any) -> Iterator[Any]:
    """The runner of a config in a folder that is removed; `Finished` ends its training."""
    from mmengine.runner import Runner

    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Finished):
        settings.work_dir, settings.log_level = folder, 'WARNING'
        # mmengine names runs by the second, and warns of a second one of that name in a process
        settings.experiment_name = Path(folder).name
        yield Runner.from_cfg(settings)


Measured = TypeVar('Measured')


def measured_of(every: Sequence[Measured], iterations: int) -> Sequence[Measured]:
    """What counts of the iterations that ran."""
    measured = every[WARM_UP:]
    check(len(measured) == iterations, 'iterations', iterations, f'at most {len(measured)} here')
    return measured


def describe_training_machine() -> dict[str, Any]:
    """Where mmengine trains: a GPU if there is one."""
    return describe_machine('cuda' if torch.cuda.is_available() else 'cpu')
