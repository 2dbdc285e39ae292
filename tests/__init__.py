"""A package, or processes that tests spawn would import the `tests` that soft-moe installs."""

import resource
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode


def cases(names: str, *rows: Any, ids: Any = None) -> pytest.MarkDecorator:
    """`pytest.mark.parametrize`, with a row for each argument."""
    return pytest.mark.parametrize(names, rows, ids=ids)


def mostly_long(values: Iterable[str], *short: str) -> list[Any]:
    """Parameters of which the long suite alone has those that are not named."""
    return [pytest.param(v, marks=[pytest.mark.long] * (v not in short)) for v in values]


def refused(message: str, call: Callable, *args: Any, error: Any = ValueError, **more: Any) -> str:
    """What a call says that must fail: one line, and no advice to switch protection off."""
    with pytest.raises(error, match=message) as caught:
        call(*args, **more)
    said = str(caught.value)
    assert '\n' not in said and 'weights_only' not in said
    return said


FILL = {'uniform_', 'erfinv_', 'mul_', 'add_', 'clamp_', 'normal_', 'fill_', 'zero_'}


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Files of this process end after `size` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class _Undrawn(TorchFunctionMode):
    """Tensors without values are not filled, which takes most of the time of building a model."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, '__name__', '') in FILL and args and args[0].is_meta:
            return args[0]
        return func(*args, **kwargs or {})


@contextmanager
def on_meta() -> Iterator[None]:
    """Models are built whose tensors have shapes and no values."""
    with torch.device('meta'), _Undrawn():
        yield


def needs_onnx() -> None:
    for name in ('onnx', 'onnxscript', 'onnxruntime'):
        pytest.importorskip(name)
