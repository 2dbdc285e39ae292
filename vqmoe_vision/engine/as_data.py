"""What `torch.load` reads of a checkpoint beside weights: the log that mmengine leaves."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

from vqmoe_vision.models.weights import beside_weights

# `torch.load` takes no file at all where both are set
_FORCED, _SWITCHED_OFF = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD', 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'
_ENVIRONMENT = threading.RLock()


class _Log(HistoryBuffer):
    """A log while it is read. mmengine's own lets a file set the functions of all logs."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        numbers = ('_log_history', '_count_history')
        if not all(isinstance(state.get(name), np.ndarray) for name in numbers):
            raise UnpicklingError('a log without numbers')
        self._set_default_statistics()
        self.__dict__.update({name: state[name] for name in numbers})
        self.max_length = int(state['max_length'])
        self.__class__ = HistoryBuffer


torch.serialization.add_safe_globals(beside_weights(_Log))


@contextmanager
def as_data() -> Iterator[None]:
    """Lets `torch.load` read data alone, whatever its caller and the environment say."""
    with _ENVIRONMENT:  # of the whole process
        before = {name: os.environ.pop(name, None) for name in (_FORCED, _SWITCHED_OFF)}
        os.environ[_FORCED] = '1'
        try:
            yield
        finally:
            del os.environ[_FORCED]
            os.environ.update({name: value for name, value in before.items() if value is not None})
