"""Lets torch read a checkpoint of mmengine as data: weights, and the log beside them.

`torch.load` refuses any type that it does not know. Of the packages named mmengine only the
onedl one says what else it writes, and leaves out the float32 scalars that mmseg's metrics are.
"""

from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer


def _getattr(owner: object, name: str) -> Any:
    """What a log calls to name its means and minima; the real one reaches any code from there."""
    if owner is not HistoryBuffer:
        raise UnpicklingError(f'{name} of {owner!r} is not part of a log')
    return getattr(owner, name)


_NUMBERS = '?' + np.typecodes['AllInteger'] + np.typecodes['AllFloat']
_IN_A_LOG = [
    HistoryBuffer,
    np.ndarray,
    np.dtype,
    *{type(np.dtype(code)) for code in _NUMBERS},
    # numpy's functions that rebuild an array and a scalar; their module depends on the version
    np.ndarray(0).__reduce__()[0],
    np.float32(0).__reduce__()[0],
]
# With their names: the onedl mmengine forgets after every checkpoint what was added without.
torch.serialization.add_safe_globals(
    [
        *((item, f'{item.__module__}.{item.__qualname__}') for item in _IN_A_LOG),
        (_getattr, 'builtins.getattr'),
    ]
)
