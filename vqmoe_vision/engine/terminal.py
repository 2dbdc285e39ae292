"""What a terminal shows of a run: what is trained on what, how far it is, what came of it."""

import logging
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import Runner

from .config import innermost
from .loops import progress_of
from .model import unwrapped

CHOICES = ('bar', 'plain')
_WIDTH = 24  # of the bar, in columns
_CLEAR = '\r\x1b[K'


def quiet(kind: type[Runner]) -> type[Runner]:
    """A runner whose config and environment go to the log file alone."""

    def build_logger(self: Runner, *args: Any, **kwargs: Any) -> Any:
        logger = kind.build_logger(self, *args, **kwargs)
        for handler in _of_terminal(logger):
            handler.setLevel(max(handler.level, logging.WARNING))
        return logger

    return type(kind.__name__, (kind,), {'build_logger': build_logger})


def follow(runner: Runner, choice: str | None) -> 'TerminalHook':
    """Shows a run that `quiet` has built: a bar on a terminal, the lines of the log elsewhere."""
    bar = (choice or CHOICES[not sys.stdout.isatty()]) == 'bar' and runner.rank == 0
    for handler in _of_terminal(runner.logger):
        if bar:
            handler.addFilter(lambda record: print(_CLEAR, end='') is None)
        elif handler.level == logging.WARNING:  # of other ranks it is that of errors
            handler.setLevel(logging.INFO)
    runner.register_hook(hook := TerminalHook(runner, bar), 'LOWEST')
    return hook


def _of_terminal(logger: logging.Logger) -> list[logging.Handler]:
    return [handler for handler in logger.handlers if type(handler) is logging.StreamHandler]


class TerminalHook(Hook):
    """Says where a run begins and ends, and shows a bar between if there is one."""

    def __init__(self, runner: Runner, bar: bool) -> None:
        self._runner, self._bar = runner, bar
        self._score = ''

    def say(self, line: str) -> None:
        """Shows a line, which the log file gets too."""
        self._runner.logger.info(line)
        if self._bar:
            print(f'{_CLEAR}{line}')

    def before_train(self, runner: Runner) -> None:
        """Says what is trained on what."""
        done, end, limit = progress_of(runner)
        kind = limit.removeprefix('max_')
        begun = f', from {kind} {done} on' if done else ''
        self.say(f'Training {self._what("train")}: {end} {kind}{begun}, into {runner.work_dir}')

    def before_test(self, runner: Runner) -> None:
        """Says what is tested on what."""
        self.say(f'Testing {self._what("test")}')

    def _what(self, split: str) -> str:
        runner, loader = self._runner, f'{split}_dataloader'
        model = runner.cfg.model.get('module', runner.cfg.model)
        names = dict.fromkeys(str(part.type) for part in innermost(runner.cfg[loader].dataset))
        size = sum(parameter.numel() for parameter in unwrapped(runner).parameters()) / 1e6
        name = (model.get('backbone') or model).get('model_name', model.type)
        images = len(getattr(runner, loader).dataset)
        return f'{name} ({size:.1f} M parameters) on {" and ".join(names)} ({images} images)'

    def after_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        """Moves the bar; the loss is the newest that somebody has read from the device."""
        losses = runner.message_hub.log_scalars.get('train/loss')
        known = losses.current() if losses is not None and len(losses.data[0]) else None
        left = timedelta(seconds=int(runner.message_hub.get_info('eta', 0)))
        shown = ['' if known is None else f'loss {known:.4f}', self._score, f'{left} left']
        self._draw(runner.iter + 1, runner.max_iters, shown)

    def after_val_iter(self, runner: Runner, batch_idx: int, *_: Any, **__: Any) -> None:
        """Moves the bar."""
        self._draw(batch_idx + 1, len(runner.val_dataloader), ['validation', self._score])

    def after_test_iter(self, runner: Runner, batch_idx: int, *_: Any, **__: Any) -> None:
        """Moves the bar."""
        self._draw(batch_idx + 1, len(runner.test_dataloader), [])

    def _draw(self, done: int, end: int, shown: Sequence[str]) -> None:
        if self._bar:
            filled = _WIDTH * done // end
            text = f'{"█" * filled}{"░" * (_WIDTH - filled)} {done}/{end}'
            print('  '.join([_CLEAR + text, *filter(None, shown)]), end='\r', flush=True)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Keeps the score by which the best checkpoint is chosen, or the first."""
        found = metrics or {}
        saves = next((hook for hook in runner.hooks if isinstance(hook, CheckpointHook)), None)
        asked = getattr(saves, 'key_indicators', None) or [next(iter(found), None)]
        self._score = '  '.join(f'{name} {found[name]:.2f}' for name in asked if name in found)

    def after_train(self, runner: Runner) -> None:
        """Says what came of it and where that lies."""
        info = runner.message_hub.get_info
        files = {'best': info('best_ckpt'), 'last': info('last_ckpt')}
        told = [f'{name} {path}' for name, path in files.items() if path]
        self.say(', '.join(filter(None, ['Trained', self._score, *told])))

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Says the scores of the data set, without those of layers."""
        scores = {n: v for n, v in (metrics or {}).items() if not n.startswith('blocks.')}
        self.say('Tested  ' + '  '.join(f'{name} {value:.2f}' for name, value in scores.items()))
