"""Operators that mmengine's `get_model_complexity_info` would count as zero, also in mmseg."""

import math
from collections.abc import Sequence
from typing import Any

from mmengine.analysis.complexity_analysis import (
    _DEFAULT_SUPPORTED_ACT_OPS,
    _DEFAULT_SUPPORTED_FLOP_OPS,
)
from mmengine.analysis.jit_handles import generic_activation_jit, get_shape


def _experts(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """Of (R, in) rows by weights (E, out, in): each row meets one expert."""
    (num_rows, in_features), (_, out_features, _) = map(get_shape, inputs[:2])
    return num_rows * in_features * out_features


def _attention(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """Of queries (..., N, D), keys (..., M, D) and values (..., M, V): scores and their sums."""
    query, key, value = map(get_shape, inputs[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


_FLOPS = {
    'vqmoe_vision::grouped_linear': _experts,
    'aten::scaled_dot_product_attention': _attention,
}
_DEFAULT_SUPPORTED_FLOP_OPS.update(_FLOPS)
_DEFAULT_SUPPORTED_ACT_OPS.update({name: generic_activation_jit() for name in _FLOPS})
