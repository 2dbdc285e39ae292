"""How many operators a layer starts in a training step, as on a card: each is a launch or more.

Operators of torch that are no views are counted, under bfloat16 autocast, with the kernel that a
card runs, and inside operators of this package. Casts are counted aside: that of a weight is read
and written once whatever is done about it. Six layers are trained together, as a model has several.
"""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from vqmoe_vision.moe import METHODS, collect_losses
from vqmoe_vision.moe.kernels import KERNELS

from .conftest import Patched

LAYERS, IMAGES, TOKENS = 6, 16, 80  # more tokens than a codebook keeps as its sample
WIDTH = 8  # 16 bytes, as `grouped_mm` wants
# of a method with the compute of two experts per token: operators of a layer, and casts
LIMITS = {
    'smoe': (86, 14),
    'xmoe': (93, 14),
    'stablemoe': (113, 15),
    'softmoe': (61, 22),
    'vqmoe': (140, 17),
    'ecmoe': (54, 12),
    'hashmoe': (47, 13),
    'mocle': (73, 14),
    'tgrmoe': (99, 14),
}


class Count(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == 'vqmoe_vision':
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))
        if not func.is_view:
            self.found[func._schema.name.removeprefix('aten::')] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('method', METHODS)
def test_a_layer_starts_few_operators(method, monkeypatch):
    monkeypatch.setitem(KERNELS, 'batched', KERNELS['grouped_mm'])  # chosen, and not by its name
    net = Patched()
    layers = (net.make_layer(method, 4, preset='matched') for _ in range(LAYERS))
    net.layers = nn.ModuleList(layers)
    for _ in range(2):  # of which the second counts
        inputs = [x.detach().requires_grad_() for x in torch.randn(LAYERS, IMAGES, TOKENS, WIDTH)]
        net.zero_grad()
        net.read(inputs[0])
        with Count() as count, collect_losses(net) as collected:
            count.found.clear()  # of what opens the block
            with torch.autocast('cpu', torch.bfloat16):
                answers = [layer(x) for layer, x in zip(net.layers, inputs, strict=True)]
            total = collected.total()
            ends = [*answers, total] if total.requires_grad else answers
            torch.autograd.backward(ends, [torch.ones_like(end) for end in ends])
    found = count.found
    found['ones_like'] -= len(ends)  # which are the test's own
    casts = found.pop('_to_copy')
    operators_at_most, casts_at_most = LIMITS[method]
    assert found.total() / LAYERS <= operators_at_most, found
    assert casts / LAYERS <= casts_at_most
