"""Memory stays flat while a model trains and predicts, whoever collects its losses.

Two measures. The objects that Python keeps, tensors among them, are counted: fewer than one more in
four steps. What torch keeps for itself, such as a graph behind a tensor, is seen in the memory of
the process: a graph of this model is about 0.7 MB, so that one kept in each step would be 17 MB in
the short form and 700 MB in the long one. malloc's own keeping comes to one or two.
"""

import contextlib
import gc
from collections.abc import Callable
from pathlib import Path
from resource import getpagesize

import pytest
import torch
from torch import nn

from vqmoe_vision import collect_losses
from vqmoe_vision.moe import METHODS

from .conftest import make

PROCESS_BYTES = 8 * 2**20


def resident() -> int:
    """Bytes of the process that are in memory."""
    return int(Path('/proc/self/statm').read_text().split()[1]) * getpagesize()


def held() -> tuple[int, int]:
    """Objects that Python tracks, and bytes of the process."""
    gc.collect()
    return len(gc.get_objects()), resident()


def growth(step: Callable[[], None], num_steps: int) -> tuple[int, int]:
    """What is held more after so many steps, without the first ones, which fill caches."""
    for _ in range(10):
        step()
    gc.collect()
    step()
    objects, process = held()
    for _ in range(num_steps):
        step()
    more_objects, more_process = held()
    return more_objects - objects, more_process - process


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


def check_flat(method: str, training: bool, collects: bool, num_steps: int) -> None:
    model = make(method, depth=1, moe_layers='every1')
    objects, process = growth(stepper(model, training, collects), num_steps)
    # one object a step would be as many as steps; caches of torch may keep a few, once
    assert objects < num_steps / 2
    assert process < PROCESS_BYTES


pytestmark = [
    pytest.mark.filterwarnings('ignore:training without collect_losses:UserWarning'),
    pytest.mark.parametrize('collects', [True, False], ids=['collector', 'alone']),
    pytest.mark.parametrize('training', [True, False], ids=['train', 'eval']),
    pytest.mark.parametrize('method', METHODS),
]


def test_memory_is_flat(method: str, training: bool, collects: bool) -> None:
    check_flat(method, training, collects, 24)


@pytest.mark.long
def test_memory_is_flat_for_a_thousand_steps(method: str, training: bool, collects: bool) -> None:
    check_flat(method, training, collects, 1000)
