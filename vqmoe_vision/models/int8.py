"""Which layers of a model torchao has quantized."""

from __future__ import annotations

from torch import Tensor, nn

from ..moe.experts import StackedLinear


def is_int8(model: nn.Module) -> bool:
    """Whether a linear layer of a model has been quantized."""
    linears = (module for module in model.modules() if isinstance(module, nn.Linear))
    return not all(map(is_float, linears))


def is_float(layer: nn.Linear | StackedLinear) -> bool:
    """Whether a layer's weights are numbers as they are: those in int8 are a type of torchao."""
    return type(layer.weight) in (nn.Parameter, Tensor)
