"""Memory stays flat while a model trains and predicts, whoever collects its losses.

A graph that one step keeps is about 0.7 MB of the process, so 17 MB in the short form and 700 MB in
the long one; malloc's own keeping comes to one or two.
"""

import contextlib
import gc
from collections.abc import Callable
from itertools import product
from pathlib import Path
from resource import getpagesize

import pytest
import torch
from torch import nn

from vqmoe_vision import collect_losses
from vqmoe_vision.moe import METHODS

from .. import cases
from .conftest import make

PROCESS_BYTES = 8 * 2**20


def resident() -> int:
    """Bytes of the process that are in memory."""
    return int(Path('/proc/self/statm').read_text().split()[1]) * getpagesize()


def growth(step: Callable[[], None], num_steps: int) -> tuple[int, int]:
    """Objects and bytes that are held more after so many steps; the first ones fill caches."""
    for _ in range(11):
        step()
    gc.collect()
    objects, process = len(gc.get_objects()), resident()
    for _ in range(num_steps):
        step()
    gc.collect()
    return len(gc.get_objects()) - objects, resident() - process


def stepper(model: nn.Module, training: bool, collects: bool) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.train(training).parameters(), lr=1e-3)
    images = torch.randn(8, 3, 32, 32)

    def step() -> None:
        with collect_losses(model) if collects else contextlib.nullcontext() as collected:
            loss = model(images).square().mean()
            if not training:
                return
            if collected is not None:
                loss = loss + collected.total()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@pytest.fixture(autouse=True)
def _new_objects_only() -> None:
    """What was there before is not counted, which saves most of the time."""
    gc.freeze()


pytestmark = [
    pytest.mark.filterwarnings('ignore:training without collect_losses:UserWarning'),
    pytest.mark.parametrize('method', METHODS),
]
LONG = product((True, False), (True, False), (1000,))
LONG = [pytest.param(*case, marks=pytest.mark.long) for case in LONG]


@cases('training, collects, num_steps', (True, True, 24), (False, False, 24), *LONG)
def test_memory_is_flat(method, training, collects, num_steps):
    model = make(method, depth=1, moe_layers='every1')
    objects, process = growth(stepper(model, training, collects), num_steps)
    # one object a step would be as many as steps; caches of torch may keep a few, once
    assert objects < num_steps / 2
    assert process < PROCESS_BYTES
