"""`benchmark.py gpu`: whether a card computes right, what it waits for, and how fast it is.

Kernels are compared with plain loops in every dtype. A training step of every method, and of a
config of each task, runs with every wait for the host forbidden. Then layers and whole networks
are timed. The result is one row, which can be sent in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_

from vqmoe_vision.moe import METHODS, use_kernel
from vqmoe_vision.moe.kernels import KERNELS

from .cells import DTYPES, Cell, Settings
from .inputs import Inputs
from .networks import Comparison, Network
from .oracle import WrongResultError, check_against_oracle
from .ours import ours
from .training import Finished, running, settings_of

KERNEL_CELL = Cell(tokens=197, batch=2, width=384, top_k=2)
# a small config of each task, whose data come with a library
CONFIGS = {
    'classification': 'configs/classification/digits/demo/vit_tiny_vqmoe_demo.py',
    'segmentation': 'configs/segmentation/digit_scenes/segmenter_vit_tiny_vqmoe_digit_scenes.py',
}
STEPS = 4  # of which the first two may wait: an optimizer makes its state


def check_kernels(settings: Settings, cell: Cell = KERNEL_CELL) -> list[dict[str, Any]]:
    """Every kernel in every dtype, in outputs and gradients.

    Args:
        settings: The device.
        cell: Shape of the layer.

    Returns:
        A row each: `kernel`, `dtype`, as `result` 'equal', or why it is not or does not run, and
        `ok`, whether nothing is wrong.
    """
    rows = []
    for dtype in DTYPES:
        shaped = replace(cell, dtype=dtype)
        inputs = Inputs(shaped, settings.device)
        (contender,) = ours(shaped, settings, inputs)
        for kernel in KERNELS:
            try:
                with use_kernel(kernel):
                    check_against_oracle(contender, inputs.batch(0), shaped, settings)
                result = 'equal'
            except (ValueError, WrongResultError) as reason:
                result = str(reason)
            # a kernel that does not take a dtype says so, and is not wrong
            ok = result == 'equal' or 'is not possible' in result
            rows.append({'kernel': kernel, 'dtype': dtype, 'result': result, 'ok': ok})
    return rows


@contextmanager
def waiting_forbidden(device: str) -> Iterator[None]:
    """Makes whatever waits for a card an error. Other devices have nothing to wait for."""
    if not device.startswith('cuda'):
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode('error')
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def check_methods(
    settings: Settings, sizes: Mapping[str, Any] | None = None, img_size: int = 224
) -> list[dict[str, Any]]:
    """Training steps of every method and of a dense model, in bfloat16.

    Args:
        settings: The device.
        sizes: Options of all models, such as `depth`; None for theirs.
        img_size: Side in pixels.

    Returns:
        A row each: `step`, the model; as `result` that it waits for nothing, or what for; `ok`.
    """
    options = [f'{name}={value}' for name, value in (sizes or {}).items()]
    specs = [f'vit_tiny_{method}' for method in METHODS] + ['vit_tiny_patch16_224']
    specs = [','.join([spec, *options]) for spec in specs]
    comparison = Comparison(
        models=tuple(specs), img_size=img_size, dtype='bfloat16', amp=True, modes=('training',)
    )
    return [_row(spec, _step_of(spec, comparison, settings), settings) for spec in specs]


def _step_of(spec: str, comparison: Comparison, settings: Settings) -> Callable[[int], None]:
    """Forward, backward, clipping and optimizer of one model."""
    network = Network(spec, comparison, settings, False)
    network.model.train()

    def step(index: int) -> None:
        network.forward(index).backward()
        clip_grad_norm_(network.model.parameters(), 1.0)
        network.update()

    return step


def check_configs(settings: Settings) -> list[dict[str, Any]]:
    """Iterations of a config of each task with all hooks, as `check_methods`."""
    from vqmoe_vision.engine.cli import use_amp

    rows = []
    for task, path in CONFIGS.items():
        config = settings_of(path, [])
        use_amp(config)
        with _outcome(f'{task}: {path}', settings.device) as row, running(config) as runner:
            runner.train_loop.run_iter = _watched(runner.train_loop.run_iter, settings.device)
            runner.train()
        rows.append(row)
    return rows


def _row(spec: str, step: Callable[[int], None], settings: Settings) -> dict[str, Any]:
    watched = _watched(step, settings.device)
    with _outcome(spec, settings.device) as row, suppress(Finished):
        for index in count():
            watched(index)
    return row


def _watched(step: Callable[..., None], device: str) -> Callable[..., None]:
    """A step that may wait in the first half of `STEPS`, and then not, and ends after them."""
    numbers = count(1)

    def watched(*args: Any, **kwargs: Any) -> None:
        number = next(numbers)
        with waiting_forbidden(device) if number > STEPS // 2 else nullcontext():
            step(*args, **kwargs)
        if number == STEPS:
            raise Finished

    return watched


@contextmanager
def _outcome(step: str, device: str) -> Iterator[dict[str, Any]]:
    """The row of steps that run inside the block."""
    nothing = 'waits for nothing' if device.startswith('cuda') else f'runs; {device} has no waits'
    row = {'step': step, 'result': nothing, 'ok': True}
    try:
        yield row
    except RuntimeError as reason:
        row.update(result=str(reason).strip().partition('\n')[0], ok=False)
