"""`benchmark.py gpu`: whether a card computes right, what it waits for, and how fast it is.

Kernels are compared with plain loops in every dtype. Training steps of every method, classifying
and segmenting, run with every wait for the host forbidden. Then layers and whole networks are
timed and held against limits. The result is one row, which can be sent in.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from .cells import Settings
from .environment import describe_machine
from .gpu_kernels import check_kernels
from .gpu_stages import Part, run_stages
from .gpu_steps import check_configs, check_methods
from .model_presets import MODEL_PRESETS
from .presets import LAYER_PRESETS, Preset
from .report import LIMIT_COLUMNS, table
from .runs import run_layers, run_models
from .timing import use_device


def run_gpu(args: argparse.Namespace) -> bool:
    """Runs all of it."""
    layers, networks = LAYER_PRESETS['gpu'], MODEL_PRESETS['gpu']
    settings = Settings(device=args.device, repeats=layers.repeats, compiled=True)
    use_device(settings.device)
    run: dict[str, Any] = {'command': 'gpu', 'header': describe_machine(settings.device)}
    print(*(f'{name}: {value}' for name, value in run['header'].items()), sep='\n')
    stages: dict[str, dict[str, Part]] = {
        'kernels': {'kernels': partial(check_kernels, settings)},
        'methods': {'methods': partial(check_methods, settings)},
        'configs': {'configs': partial(check_configs, settings)},
        'layers': _layers(layers, settings),
        'networks': _networks(networks, settings),
    }
    run_stages(run, stages, (*layers.gates, *networks.gates), args.out)
    return _tell(run, args)


def _layers(preset: Preset, settings: Settings) -> dict[str, Part]:
    alone = {f'layers of width {run[0].width}': replace(preset, runs=(run,)) for run in preset.runs}
    return {title: partial(_rows, run_layers, one, settings) for title, one in alone.items()}


def _networks(preset: Preset, settings: Settings) -> dict[str, Part]:
    alone = {
        f'networks over {comparison.baseline}': replace(preset, comparisons=(comparison,))
        for comparison in preset.comparisons
    }
    return {title: partial(_rows, run_models, one, settings) for title, one in alone.items()}


def _rows(
    measure: Callable[[Preset, Settings], tuple[list[dict[str, Any]], list[Any]]],
    preset: Preset,
    settings: Settings,
) -> list[dict[str, Any]]:
    return measure(preset, settings)[0]


def _tell(run: Mapping[str, Any], args: argparse.Namespace) -> bool:
    print(f'\nlimits, which are for an H100; this is {run["header"]["device"]}')
    print(table(run['limits'], LIMIT_COLUMNS))
    print(*(f'{seconds:>6.1f} s {part}' for part, seconds in run['seconds'].items()), sep='\n')
    print(f'wrote {args.out}')
    print(*(f'failed: {" ".join(map(str, row.values()))}' for row in run['failed']), sep='\n')
    missed = any(row['result'] != 'met' for row in run['limits'])
    return not run['failed'] and not (args.gate and missed)
