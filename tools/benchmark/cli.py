"""What `tools/benchmark.py` does."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import torch

from vqmoe_vision.models.export import require_packages
from vqmoe_vision.moe.config import check

from .cells import Cell, Settings
from .data import run_data
from .environment import describe_machine, restart_prepared
from .exported import Exports, default_models, export_columns, measure_exports
from .gates import judge
from .gpu import run_gpu
from .layers import DROPPING, choose
from .model_presets import MODEL_PRESETS
from .networks import MODES, Comparison
from .options import make_parser
from .overhead import measure_overhead
from .plots import draw
from .presets import LAYER_PRESETS, Preset
from .report import (
    overhead_line,
    read,
    table,
    training_table,
    write,
)
from .runs import run_layers, run_models
from .scaling import (
    PROCESSES,
    SMALL,
    measure_scaling,
    measured_table,
    predict,
    predicted_tables,
)
from .scaling_costs import Cluster
from .timing import use_device
from .training import describe_training_machine, measure_training
from .tune import run_tune

# options that a preset decides, with their values in a run without one
LAYER_GRID: dict[str, Any] = {
    'tokens': [197],
    'batch': [8],
    'width': [384],
    'experts': [8],
    'top_k': [1],
    'dtype': ['float32'],
    'skew': [1.0],
    'amp': False,
    'contenders': None,
}
MODEL_GRID: dict[str, Any] = {
    'models': ['vit_small_smoe,top_k=1'],
    'baseline': 'vit_small_patch16_224',
    'batch': 8,
    'img_size': 224,
    'dtype': ['float32'],
    'amp': False,
    'modes': list(MODES),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Benchmarks layers or models; a mistake is one line unless `--debug`."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = make_parser().parse_args(arguments)
    try:
        finished = _main(args, restart=argv is None)
    except Exception as error:
        if args.debug:
            raise
        text = ' '.join(str(error).split())
        known = isinstance(error, ValueError | OSError | ImportError | RuntimeError)
        sys.exit(f'error: {text}' if known else f'error: {type(error).__name__}: {text}')
    if not finished:
        sys.exit(1)


def _main(args: argparse.Namespace, restart: bool) -> bool:
    if args.command == 'training':
        return _run_training(args, restart)
    if args.command == 'export':
        return _run_exports(args, restart)
    if args.command == 'gpu':
        return run_gpu(args)
    if args.command == 'scaling':
        return _run_scaling(args)
    if args.command == 'tune':
        run_tune(args, restart)
        return True
    if args.command == 'data':
        run_data(args)
        return True
    preset = _preset(args)
    if args.source is not None:
        return _use_saved(args, preset)
    settings = _settings(args, preset)
    if restart:
        restart_prepared(settings.threads)
    torch.set_num_threads(settings.threads)
    use_device(settings.device)
    run: dict[str, Any] = {'command': args.command, 'header': describe_machine(settings.device)}
    run['settings'] = vars(settings)
    for name, value in {**run['header'], **run['settings']}.items():
        print(f'{name}: {value}')
    for note in preset.notes:
        print(note)
    run['rows'], run['skipped'] = (run_layers if args.command == 'moe' else run_models)(
        preset, settings
    )
    if args.out is not None:
        write(args.out, run)
    if args.plot is not None:
        draw(run, args.plot)
    return _judged(run['rows'], preset, args)


def _use_saved(args: argparse.Namespace, preset: Preset) -> bool:
    saved = read(args.source)
    check(args.plot or args.gate, '--from', str(args.source), 'only with --plot or --gate')
    of_runs = {'threads', 'clock', 'repeats', 'out', 'compiled', 'capacity_factor'}
    of_runs |= (LAYER_GRID if args.command == 'moe' else MODEL_GRID).keys()
    given = sorted(name for name in of_runs if getattr(args, name, None) not in (None, False))
    check(not given, '--from', str(args.source), f'without what sets up a run: {given}')
    # others have other rows, which are not drawn
    command = saved['command']
    check(command == args.command, '--from', str(args.source), f'a run of {args.command!r}')
    check(bool(saved['rows']), '--from', str(args.source), 'a run in which something was measured')
    if args.plot is not None:
        draw(saved, args.plot)
        print(f'wrote {args.plot}')
    if not args.gate:
        return True
    modes = {row['mode'] for row in saved['rows']}
    check('fwd' not in modes, '--from', str(args.source), 'a run with backward passes')
    return _judged(saved['rows'], preset, args)


def _preset(args: argparse.Namespace) -> Preset:
    """The named preset, or one that holds what the options ask for."""
    grid = LAYER_GRID if args.command == 'moe' else MODEL_GRID
    given = {name: getattr(args, name) for name in grid if getattr(args, name) is not None}
    if args.preset is not None:
        clash = sorted(f'--{name.replace("_", "-")}' for name in given)
        check(not clash, '--preset', args.preset, f'only without {", ".join(clash)}')
        preset = (LAYER_PRESETS if args.command == 'moe' else MODEL_PRESETS)[args.preset]
        forward_only = args.command == 'moe' and args.mode == 'fwd'
        gated = args.gate or preset.always_gated
        # where all contenders run, peers are among them, and ours must not be slower
        limits = preset.gates or any(names is None for _, names in preset.runs)
        check(bool(limits) or not gated, '--gate', args.gate, 'only with a preset that has limits')
        check(not (forward_only and gated), '--mode', 'fwd', 'fwdbwd where limits are judged')
        return preset
    check(not args.gate, '--gate', args.gate, 'only with --preset, which has the limits')
    chosen = {**grid, **given}
    amp = chosen.pop('amp')
    if args.command == 'model':
        dtypes = chosen.pop('dtype')
        chosen.update(models=tuple(chosen['models']), modes=tuple(chosen['modes']))
        low = [amp and dtype != 'float32' for dtype in dtypes]
        pairs = zip(dtypes, low, strict=True)
        return Preset(comparisons=tuple(Comparison(**chosen, dtype=d, amp=a) for d, a in pairs))
    names = choose(chosen.pop('contenders'))
    cells = [dict(zip(chosen, values, strict=True)) for values in product(*chosen.values())]
    cells = [{**cell, 'amp': amp and cell['dtype'] != 'float32'} for cell in cells]
    return Preset(runs=tuple((Cell(**cell), names) for cell in cells))


def _settings(args: argparse.Namespace, preset: Preset) -> Settings:
    layer = args.command == 'moe'
    if layer and args.capacity_factor is not None:
        names = {name for _, names in preset.runs for name in choose(names)}
        allowed = f'only with one of {sorted(DROPPING)}'
        check(bool(DROPPING & names), '--capacity-factor', args.capacity_factor, allowed)
    return Settings(
        device=args.device,
        threads=preset.threads if args.threads is None else args.threads,
        clock=args.clock or preset.clock,
        repeats=preset.repeats if args.repeats is None else args.repeats,
        backward=not layer or args.mode == 'fwdbwd',
        compiled=args.compiled or preset.compiled,
        capacity_factor=args.capacity_factor if layer else None,
    )


def _run_training(args: argparse.Namespace, restart: bool) -> bool:
    check(args.iterations >= 1, '--iterations', args.iterations, 'at least 1')
    if restart:
        restart_prepared(args.threads)
    torch.set_num_threads(args.threads)
    measure = measure_overhead if args.overhead else measure_training
    row = measure(args.config, args.cfg_options, args.iterations)
    header = describe_training_machine()
    print('', *(f'{name}: {value}' for name, value in header.items()), sep='\n')
    print(f'\n{args.config} {" ".join(args.cfg_options)}')
    print(overhead_line(row) if args.overhead else training_table(row['parts_ms'], row['images']))
    if args.out is not None:
        write(args.out, {'command': 'training', 'header': header, 'rows': [row]})
    return True


def _run_exports(args: argparse.Namespace, restart: bool) -> bool:
    if any(way.startswith('onnxruntime') for way in args.ways):
        require_packages()
    models = args.models or default_models()
    exports = Exports(
        models=models,
        baseline=args.baseline,
        batches=args.batch,
        ways=args.ways,
        repeats=args.repeats,
    )
    if restart:
        restart_prepared(1)
    torch.set_num_threads(1)
    header = describe_machine('cpu')
    print(*(f'{name}: {value}' for name, value in header.items()), sep='\n')
    rows = measure_exports(exports)
    shown = [
        {**row, 'file_mb': None if row['file_bytes'] is None else row['file_bytes'] / 1e6}
        for row in rows
    ]
    print(table(shown, export_columns(exports.batches)))
    if args.out is not None:
        write(args.out, {'command': 'export', 'header': header, 'rows': rows})
    return True


def _run_scaling(args: argparse.Namespace) -> bool:
    of_other = ('model', 'processes') if args.model_only else ('inside', 'between', 'teraflops')
    for name in of_other:
        allowed = f'only with{"out" if args.model_only else ""} --model-only'
        check(getattr(args, name) is None, f'--{name}', getattr(args, name), allowed)
    torch.set_num_threads(1)
    run: dict[str, Any] = {'command': 'scaling', 'header': describe_machine('cpu')}
    if args.model_only:
        given = {'inside': args.inside, 'between': args.between, 'flops': args.teraflops}
        units = {'inside': 1e9, 'between': 1e9, 'flops': 1e12}
        cluster = Cluster(**{k: v * units[k] for k, v in given.items() if v is not None})
        run['assumed'] = vars(cluster)
        run['rows'] = predict(64 if args.batch is None else args.batch, cluster)
        text = predicted_tables(run['rows'])
    else:
        batch = 8 if args.batch is None else args.batch
        run['settings'] = {'model': args.model or SMALL, 'batch': batch}
        run['rows'] = measure_scaling(
            run['settings']['model'], batch, args.processes or list(PROCESSES)
        )
        text = measured_table(run['rows'])
    print(*(f'{name}: {value}' for name, value in run['header'].items()), sep='\n')
    print(text)
    if args.out is not None:
        write(args.out, run)
    return True


def _judged(rows: Sequence[Mapping[str, Any]], preset: Preset, args: argparse.Namespace) -> bool:
    verdicts = judge(preset.gates, rows)
    if verdicts:
        print('', *(verdict.text for verdict in verdicts), sep='\n')
    return not (args.gate or preset.always_gated) or not any(v.broken for v in verdicts)
