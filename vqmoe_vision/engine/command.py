"""How every tool runs and what a terminal shows: a mistake is one line, a run has a bar."""

import argparse
import logging
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from errno import EDQUOT, EFBIG, ENOSPC
from pickle import UnpicklingError
from typing import Any

from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import Runner

from .checkpoint_files import SaveError
from .checkpoint_hook import end_by
from .config import expand, innermost
from .model import unwrapped
from .processes import LostError, RankError
from .seeding import progress_of
from .step_values import NonFiniteError

# Errors whose message says what a user did wrong; any other type is named in front of its message.
_USER_ERRORS = (
    ValueError,
    FileNotFoundError,
    ModuleNotFoundError,
    NonFiniteError,
    SaveError,
    LostError,
)


def run(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    action: Callable[[argparse.Namespace], None],
) -> None:
    """Runs a tool so that a mistake is one line, and the trace comes with `--debug` only."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    options: dict[str, Any] = {}
    try:
        args = parser.parse_args(arguments)
        options = getattr(args, 'cfg_options', {})
        # of a log that cannot be written, as on a full disk: the error that follows is one line
        logging.raiseExceptions = '--debug' in arguments
        expand(vars(args))
        action(args)
        if sys.stdout is not None:  # as where a shell has closed it
            sys.stdout.flush()
    except KeyboardInterrupt:  # of a training under way `StopSignals` takes care
        if '--debug' in arguments:
            raise
        print('SIGINT: stopped', file=sys.stderr)
        end_by(signal.SIGINT)
    except Exception as error:
        if isinstance(error, BrokenPipeError):
            _end_if_nobody_reads()
        if '--debug' in arguments:
            raise
        where, cause = error.args if isinstance(error, RankError) else (None, error)
        where = '' if where is None else f'rank {where}: '
        sys.exit(f'error: {where}{as_typed(one_line(cause), options)}')


def _end_if_nobody_reads() -> None:
    """Ends like any program of a shell where `| head` has seen enough of what it prints."""
    with suppress(TypeError, OSError):  # there is none, or it is no file
        poll = select.poll()
        poll.register(sys.stdout, 0)  # what ends a pipe is always told
        if poll.poll(0):
            # the interpreter would try to write the rest
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            end_by(signal.SIGPIPE)


def as_typed(message: str, options: Mapping[str, Any]) -> str:
    """Names the field that a message begins with as the command line did: model.moe.top_k."""
    field = message.partition('=')[0]
    names = [name for name in options if name.endswith(f'.{field}')]
    # of several fields of this name that with the value in question
    names.sort(key=lambda name: not message.startswith(f'{field}={options[name]!r} '))
    return message.replace(field, names[0], 1) if names else message


def one_line(error: BaseException) -> str:
    """What went wrong in one line, without the frames and prefixes that frameworks add."""
    # mmengine hides the reason behind advice about PYTHONPATH, and that behind "Failed to import"
    while isinstance(error, ImportError):
        hidden = error.__cause__ if error.__suppress_context__ else error.__context__
        if not isinstance(hidden, ImportError):
            break
        error = hidden
    full = getattr(error, 'errno', None) in (ENOSPC, EDQUOT, EFBIG)
    if isinstance(error, OSError) and full and error.filename is None:
        # of a log, which does not name its file; checkpoints do
        return f'{error.strerror}: free some space; the checkpoints in the work dir are intact'
    if isinstance(error, UnpicklingError):
        return 'the checkpoint is damaged, or holds more than weights and is not loaded'
    message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if 'Original Traceback' in message:  # a data loader's worker: the reason is the last line
        return re.sub(r'^[\w.]*(Error|Exception): ', '', lines[-1])
    # mmengine up to 0.10 writes "class `X` in x.py: " once for every level of the config
    text = re.sub(r'(class `\w+` in [\w/]+\.py: )+', '', ' '.join(lines))
    return text if isinstance(error, _USER_ERRORS) else f'{type(error).__name__}: {text}'


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


def follow(runner: Runner, choice: str | None, told: str = '') -> None:
    """Shows a run that `quiet` has built: a bar on a terminal, the lines of the log elsewhere."""
    bar = (choice or CHOICES[not sys.stdout.isatty()]) == 'bar' and runner.rank == 0
    for handler in _of_terminal(runner.logger):
        if bar:
            handler.addFilter(lambda record: print(_CLEAR, end='') is None)
        elif handler.level == logging.WARNING:  # of other ranks it is that of errors
            handler.setLevel(logging.INFO)
    runner.register_hook(hook := TerminalHook(runner, bar), 'LOWEST')
    if told:
        hook.say(told)


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

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float]) -> None:
        """Keeps the score by which the best checkpoint is chosen, or the first."""
        saves = next((hook for hook in runner.hooks if isinstance(hook, CheckpointHook)), None)
        asked = getattr(saves, 'key_indicators', None) or [*metrics][:1]
        self._score = '  '.join(f'{name} {metrics[name]:.2f}' for name in asked if name in metrics)

    def after_train(self, runner: Runner) -> None:
        """Says what came of it and where that lies."""
        paths = {n: runner.message_hub.get_info(f'{n}_ckpt') for n in ('best', 'last')}
        told = [f'{name} {path}' for name, path in paths.items() if path]
        self.say(', '.join(filter(None, ['Trained', self._score, *told])))

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float]) -> None:
        """Says the scores of the data set, without those of layers."""
        scores = (f'{n} {v:.2f}' for n, v in metrics.items() if not n.startswith('blocks.'))
        self.say('  '.join(['Tested', *scores]))
