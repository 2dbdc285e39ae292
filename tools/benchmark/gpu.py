"""`benchmark.py gpu`: whether a card computes right, what it waits for, and how fast it is.

Kernels are compared with plain loops in every dtype. Training steps of every method, classifying
and segmenting, run with every wait for the host forbidden. Then layers and whole networks are
timed and held against limits. The result is one row, which can be sent in.
"""

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from .cells import Cell, Settings
from .environment import describe_machine
from .gpu_kernels import check_kernels
from .gpu_stages import Part, run_stages
from .gpu_steps import check_configs, check_methods
from .layers import run_layers
from .networks import run_networks
from .presets import LAYER_PRESETS, NETWORK_PRESETS
from .report import LIMIT_COLUMNS, table
from .timing import use_device


def run_gpu(args: argparse.Namespace) -> bool:
    """Runs all of it."""
    layers, networks = LAYER_PRESETS['gpu'], NETWORK_PRESETS['gpu']
    settings = Settings(device=args.device, repeats=layers.repeats, compiled=True)
    use_device(settings.device)
    run: dict[str, Any] = {'command': 'gpu', 'header': describe_machine(settings.device)}
    print(*(f'{name}: {value}' for name, value in run['header'].items()), sep='\n')
    parts: list[tuple[str, str, Part]] = [
        ('kernels', 'kernels', partial(check_kernels, settings)),
        ('methods', 'methods', partial(check_methods, settings)),
        ('configs', 'configs', partial(check_configs, settings)),
    ]
    for cell, names in layers.runs:
        alone = partial(_rows_of_layers, cell, names, settings)
        parts.append(('layers', f'layers of width {cell.width}', alone))
    for one in networks.comparisons:
        alone = partial(run_networks, [one], settings)
        parts.append(('networks', f'networks over {one.baseline}', alone))
    run_stages(run, parts, (*layers.gates, *networks.gates), args.out)
    return _tell(run, args)


def _rows_of_layers(
    cell: Cell, names: Sequence[str] | None, settings: Settings
) -> list[dict[str, Any]]:
    return run_layers([(cell, names)], settings)[0]


def _tell(run: Mapping[str, Any], args: argparse.Namespace) -> bool:
    print(f'\nlimits, which are for an H100; this is {run["header"]["device"]}')
    print(table(run['limits'], LIMIT_COLUMNS))
    print(*(f'{seconds:>6.1f} s {part}' for part, seconds in run['seconds'].items()), sep='\n')
    print(f'wrote {args.out}')
    print(*(f'failed: {" ".join(map(str, row.values()))}' for row in run['failed']), sep='\n')
    missed = any(row['result'] != 'met' for row in run['limits'])
    return not run['failed'] and not (args.gate and missed)
