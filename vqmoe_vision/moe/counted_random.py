"""Random numbers that are a function of counters, on the device of the counters.

torch's generators take their seed from the host, which would wait for one that is model state. The
same counters give the same numbers in every process, after a resume, and compiled or not: this is
integer arithmetic up to the last step, which is exact.

After "Parallel Random Numbers: As Easy as 1, 2, 3" (Salmon et al., SC 2011). The mixing function is
[16 21f0aaad 15 735a2d97 15] of "Prospecting for Hash Functions" (Wellons, hash-prospector on
GitHub, issue 19), the one of least bias with two multiplications: flipping an input bit is within
0.107 of 1000 of flipping every output bit half of the time. torch has no arithmetic of uint32. In
int64 no product overflows, as the multipliers are below 2^31.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_MASK = 2**32 - 1


def random_integers(rows: Tensor, *counters: Tensor | int) -> Tensor:
    """Uniform int64 in [0, 2^32) for rows in [0, 2^32) of any shape; counters name the stream."""
    # the order of counters matters, and 32 bits of each; the first may be a 0-dim int64 tensor
    first = [counter for counter in counters[:1] if isinstance(counter, Tensor)]
    numbers: Tensor = _random_integers(rows, first, list(counters[len(first) :]))
    return numbers


def random_choice(weights: Tensor, *counters: Tensor | int) -> Tensor:
    """Index (...) of one in each row of weights (..., S), at least 0, in proportion to them."""
    rows = torch.arange(weights.numel(), device=weights.device).view(weights.shape)
    # never 0, and fine near 0, where the first clocks ring
    uniform = (random_integers(rows, *counters).float() + 0.5) * 2.0**-32
    # it may round to 1: such a clock rings last, but still before those that never do
    rates = torch.where(weights > 0, weights / -torch.log1p(-uniform), -1.0)
    # exponential clocks, and the first to ring: no sums, which differ between runs on a GPU
    return rates.argmax(dim=-1)


def _numbers(rows: Tensor, first: list[Tensor], others: list[int]) -> Tensor:
    # as many counters as there are: zeros would stay zero, and be one stream however many they are;
    # mixed, or one counter would be mixed as rows are, and row and counter could change places
    stream: Tensor | int = _mix_(len(first) + len(others))
    for tensor in first:
        stream = _mix_(tensor + stream)
    for counter in others:
        stream = _mix_(stream + counter)
    # rows are mixed before too: else two streams that are near would be one, shifted by a few rows
    numbers: Tensor = _mix_(_mix_(rows.clone()).add_(stream))
    return numbers


def _mix_(value: Any) -> Any:
    """Of an integer, or of a tensor in its place."""
    value &= _MASK
    value ^= value >> 16
    value *= 0x21F0AAAD
    value &= _MASK
    value ^= value >> 15
    value *= 0x735A2D97
    value &= _MASK
    value ^= value >> 15
    return value


# One opaque operator: in a compiled model this arithmetic made a kernel of each layer, whose
# compilation took as long as that of all else in the layer. It runs as it is on tensors without
# data, where it would fail if it read something back.
_random_integers = torch.library.custom_op(
    'vqmoe_vision::random_integers', _numbers, mutates_args=()
)
_random_integers.register_fake(_numbers)
