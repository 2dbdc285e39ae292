"""`benchmark.py gpu`: whether a card computes right, what it waits for, and how fast it is.

Kernels are compared with plain loops in every dtype. A training step of every method, and of a
config of each task, runs with every wait for the host forbidden. Then layers and whole networks
are timed. The result is one row, which can be sent in.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
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
    from mmengine.runner import Runner

    from vqmoe_vision.engine.cli import load_config, use_amp

    rows = []
    for task, path in CONFIGS.items():
        with tempfile.TemporaryDirectory() as folder:
            config = load_config(path)
            use_amp(config)
            config.work_dir, config.log_level = folder, 'WARNING'
            runner = Runner.from_cfg(config)
            with _stopped_after(runner, STEPS, settings.device) as row:
                runner.train()
            rows.append({'step': f'{task}: {path}', **row})
    return rows


class _Finished(Exception):
    """Enough iterations have run."""


@contextmanager
def _stopped_after(runner: Any, steps: int, device: str) -> Iterator[dict[str, Any]]:
    """Forbids waiting in the later iterations of a runner, and ends it."""
    row = {'result': _nothing(device), 'ok': True}
    loop = runner.train_loop
    run_iter, done = loop.run_iter, 0

    def counted(*args: Any, **kwargs: Any) -> None:
        nonlocal done
        if done < steps // 2:
            run_iter(*args, **kwargs)
        else:
            with waiting_forbidden(device):
                run_iter(*args, **kwargs)
        done += 1
        if done == steps:
            raise _Finished

    loop.run_iter = counted
    try:
        yield row
    except _Finished:
        pass
    except RuntimeError as reason:
        row.update(result=_first_line(reason), ok=False)


def _row(spec: str, step: Callable[[int], None], settings: Settings) -> dict[str, Any]:
    for index in range(STEPS // 2):
        step(index)
    try:
        with waiting_forbidden(settings.device):
            for index in range(STEPS // 2, STEPS):
                step(index)
    except RuntimeError as reason:
        return {'step': spec, 'result': _first_line(reason), 'ok': False}
    return {'step': spec, 'result': _nothing(settings.device), 'ok': True}


def _nothing(device: str) -> str:
    return 'waits for nothing' if device.startswith('cuda') else f'runs; {device} has no waits'


def _first_line(reason: BaseException) -> str:
    return str(reason).strip().partition('\n')[0]
