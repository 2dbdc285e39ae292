"""What may be in a checkpoint beside weights: the log of a run, and arguments of a script.

timm's train.py and the authors of MAE and DeiT leave arguments. Nothing here needs mmengine.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any

import numpy as np
from torch.serialization import get_safe_globals, safe_globals

# What mmengine calls the class of its log.
LOG = 'mmengine.logging.history_buffer.HistoryBuffer'
_NUMBERS = '?' + np.typecodes['AllInteger'] + np.typecodes['AllFloat']
_KNOWN: list[Any] = [
    argparse.Namespace,
    np.ndarray,
    np.dtype,
    *{type(np.dtype(code)) for code in _NUMBERS},
    # numpy's functions that rebuild an array and a scalar; their module depends on the version
    np.ndarray(0).__reduce__()[0],
    np.float32(0).__reduce__()[0],
]


class _NoLog:
    """In the place of a log that nobody asks for."""

    def __setstate__(self, state: object) -> None:
        """Keeps nothing."""


def beside_weights(log: type) -> list[Any]:
    """All that may be there, for torch's list of what it may read."""

    def name_of(owner: object, name: str) -> None:
        """What a log calls to name its means and minima: those of the code that reads it."""
        if owner is not log:
            raise UnpicklingError(f'{name} of {owner!r} is not part of a log')

    # by name: timm and mmengine, which list some themselves, strike theirs out after each file
    known = [(item, f'{item.__module__}.{item.__qualname__}') for item in _KNOWN]
    return [*known, (log, LOG), (name_of, 'builtins.getattr')]


_PASSED_OVER = beside_weights(_NoLog)


@contextmanager
def logs_passed_over() -> Iterator[None]:
    """Lets `torch.load` read what is beside weights too, where nothing is known of mmengine."""
    known = get_safe_globals()
    names = {item[1] for item in known if isinstance(item, tuple)}
    # where logs are read, they stay what they are
    new = [] if LOG in names else [item for item in _PASSED_OVER if item not in known]
    with safe_globals(new):
        yield
