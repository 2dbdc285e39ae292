"""How every tool runs: a mistake is one line; Ctrl-C and `| head` leave no trace."""

import argparse
import errno
import logging
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pickle import UnpicklingError
from typing import Any

from .checkpoint_files import SaveError
from .checkpoint_hook import end_by
from .config import expand
from .finite import NonFiniteError
from .processes import LostError, RankError

# Errors whose message says what a user did wrong; any other type is named in front of its message.
_USER_ERRORS = (
    ValueError,
    FileNotFoundError,
    ModuleNotFoundError,
    NonFiniteError,
    SaveError,
    LostError,
)
# Of what cannot be written any more.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
        where, cause = '', error
        if isinstance(error, RankError):
            where, cause = f'rank {error.rank}: ', error.error
        sys.exit(f'error: {where}{as_typed(one_line(cause), options)}')


def _end_if_nobody_reads() -> None:
    """Ends like any program of a shell where `| head` has seen enough of what it prints."""
    try:
        number = sys.stdout.fileno()
    except (AttributeError, OSError):  # there is none, or it is no file
        return
    poll = select.poll()
    poll.register(number, 0)  # what ends a pipe is always told
    if poll.poll(0):
        # the interpreter would try to write the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
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
    if isinstance(error, OSError) and error.errno in _FULL and error.filename is None:
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
