"""What waits for more batches, in checkpoints."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from vqmoe_vision.engine.loops import keep_accumulated


def test_gradients_that_wait_are_kept_where_a_training_goes_on() -> None:
    model = nn.Linear(2, 1)
    model(torch.ones(1, 2)).sum().backward()
    wrapper = SimpleNamespace(should_update=lambda: False)
    runner: Any = SimpleNamespace(model=model, optim_wrapper=wrapper)
    goes_on: dict[str, Any] = {'optimizer': {}}
    keep_accumulated(runner, goes_on)
    assert goes_on['accumulated']['gradients'].keys() == {'weight', 'bias'}
    best: dict[str, Any] = {}  # which is saved without an optimizer
    keep_accumulated(runner, best)
    assert best == {}
