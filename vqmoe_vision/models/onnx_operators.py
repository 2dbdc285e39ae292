"""Operators of our models that torch's exporter cannot write as ONNX by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What `torch.onnx.export` takes as its `custom_translation_table`."""
    from onnxscript import opset18 as op

    def sort(x: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
        """ONNX's TopK puts the lower index first among equals, so that it is stable."""
        size = op.Reshape(op.Gather(op.Shape(x), op.Constant(value_int=dim)), [1])
        return op.TopK(x, size, axis=dim, largest=descending, sorted=True)

    def searchsorted(row: Any, values: Any, **options: Any) -> Any:
        """Of one sorted row (N,) and values (M,), from the left: how many are smaller."""
        assert not any(options.values())
        smaller = op.Less(op.Unsqueeze(row, [0]), op.Unsqueeze(values, [1]))
        return op.ReduceSum(op.Cast(smaller, to=7), [1], keepdims=0)  # 7: int64

    aten = torch.ops.aten
    return {aten.sort.stable: sort, aten.searchsorted.Tensor: searchsorted}
