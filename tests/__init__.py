"""A package, or processes that tests spawn would import the `tests` that soft-moe installs."""

from collections.abc import Callable
from typing import Any

import pytest


def cases(names: str, *rows: Any, ids: Any = None) -> pytest.MarkDecorator:
    """`pytest.mark.parametrize`, with a row for each argument."""
    return pytest.mark.parametrize(names, rows, ids=ids)


def refused(message: str, call: Callable, *args: Any, error: Any = ValueError, **more: Any) -> str:
    """What a call says that must fail: one line, and no advice to switch protection off."""
    with pytest.raises(error, match=message) as caught:
        call(*args, **more)
    said = str(caught.value)
    assert '\n' not in said and 'weights_only' not in said
    return said


def needs_onnx() -> None:
    for name in ('onnx', 'onnxscript', 'onnxruntime'):
        pytest.importorskip(name)
