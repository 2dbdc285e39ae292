"""Models that are built for their structure: names and shapes of tensors, without values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# They give a meta tensor back as it was, for which torch takes a millisecond and more in Python.
# A Vision Transformer has a hundred of them, most of the time that it takes to build.
_OF_VALUES: frozenset[Any] = frozenset({Tensor.clamp_, Tensor.normal_, F.normalize})


class _Undrawn(TorchFunctionMode):
    """Leaves out how values are drawn."""

    def __torch_function__(
        self, func: Callable, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in _OF_VALUES and args and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def structure_only() -> Iterator[None]:
    """Context in which models take no memory and no random numbers, and are soon built."""
    with torch.device('meta'), _Undrawn():
        yield
