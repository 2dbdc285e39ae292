"""`benchmark.py gpu`: whether a card computes right, what it waits for, and how fast it is.

One line comes first, to paste into an issue. Kernels are compared with plain loops in every dtype,
trainings with the same on the CPU, and waits for the host are counted. Then layers and whole
networks are timed, and held against what bytes and operations let expect. The result is one row,
which can be sent in.
"""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from vqmoe_vision.moe.kernels import kernel_of

from .cells import Cell, Settings
from .environment import describe_machine
from .gpu_card import measure_card
from .gpu_kernels import check_kernels
from .gpu_results import check_results
from .gpu_stages import Part, run_stages
from .gpu_steps import check_configs
from .layers import choose, measure_layer, run_layers
from .networks import run_networks
from .presets import LAYER_PRESETS, NETWORK_PRESETS
from .report import LIMIT_COLUMNS, table
from .timing import use_device

FIRST_CELL = Cell(tokens=197, batch=128, width=384, dtype='bfloat16')


def run_gpu(args: argparse.Namespace) -> bool:
    layers, networks = LAYER_PRESETS['gpu'], NETWORK_PRESETS['gpu']
    settings = Settings(device=args.device, repeats=layers.repeats, compiled=True)
    use_device(settings.device)
    run: dict[str, Any] = {'command': 'gpu', 'header': describe_machine(settings.device)}
    settings = replace(settings, card=measure_card(settings.device))
    run['header']['line'] = first_line(settings, run['header'])
    print(*(f'{name}: {value}' for name, value in run['header'].items()), sep='\n', flush=True)
    parts: list[tuple[str, str, Part]] = [
        ('kernels', 'kernels', partial(check_kernels, settings)),
        ('results', 'results', partial(check_results, settings)),
        ('configs', 'configs', partial(check_configs, settings)),
    ]
    for cell, names in layers.runs:
        alone = partial(_rows_of_layers, [(cell, names)], settings)
        parts.append(('layers', f'layers of width {cell.width}', alone))
    for one in networks.comparisons:
        alone = partial(run_networks, [one], settings)
        parts.append(('networks', f'networks over {one.baseline}', alone))
    run_stages(run, parts, (*layers.gates, *networks.gates), args.out)
    return _tell(run, args)


def first_line(settings: Settings, header: Mapping[str, Any], cell: Cell = FIRST_CELL) -> str:
    """Card, driver, torch, kernel, waits and milliseconds of one layer, before all else."""
    quick = replace(settings, compiled=False, repeats=5)
    rows = {row['contender']: row for row in measure_layer(cell, quick, choose(['layer']))[0]}
    shape = cell.experts, cell.hidden, cell.width
    kernel = kernel_of(torch.device(settings.device), cell.compute_dtype, shape)
    card, layer, dense = settings.card, rows['layer'], rows['dense']
    assert card is not None
    return (
        f'{header["device"]}, {card.flops[cell.compute_dtype] / 1e12:.3g} TFLOP/s, '
        f'{card.bytes / 1e12:.3g} TB/s, driver {header.get("driver")}, torch {torch.__version__}, '
        f'{kernel}, {layer["waits"]} waits a step, layer {layer["median_ms"]:.2f} ms '
        f'({layer["expected_ms"]:.2f} expected), dense {dense["median_ms"]:.2f} ms'
    )


def _rows_of_layers(*run: Any) -> list[dict[str, Any]]:
    return run_layers(*run)[0]


def _tell(run: Mapping[str, Any], args: argparse.Namespace) -> bool:
    print(f'\nratios over what {run["header"]["device"]} lets expect')
    print(table(run['limits'], LIMIT_COLUMNS))
    print(*(f'{seconds:>6.1f} s {part}' for part, seconds in run['seconds'].items()), sep='\n')
    print(f'wrote {args.out}')
    print(*(f'failed: {" ".join(map(str, row.values()))}' for row in run['failed']), sep='\n')
    missed = any(row['result'] != 'met' for row in run['limits'])
    return not run['failed'] and not (args.gate and missed)
