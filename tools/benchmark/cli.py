"""What `tools/benchmark.py` does."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from vqmoe_vision.models.export import require_packages
from vqmoe_vision.moe.config import check

from .cells import DTYPES, Cell, Settings
from .environment import describe_machine, restart_prepared
from .exported import (
    BASELINE,
    WAYS,
    Exports,
    default_models,
    export_columns,
    measure_exports,
)
from .gates import judge
from .layers import CONTENDERS, DROPPING, choose, measure_layer
from .networks import MODES, Comparison, measure_networks
from .overhead import measure_overhead
from .plots import draw
from .presets import LAYER_PRESETS, MODEL_PRESETS, Preset
from .report import (
    layer_table,
    network_table,
    overhead_line,
    read,
    table,
    training_table,
    write,
)
from .training import describe_training_machine, measure_training

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
    """Benchmarks layers or models; a mistake is one line unless `--debug`.

    Args:
        argv: Command line without the program's name; None takes it from `sys.argv`, and then the
            process restarts itself once to set up its allocator and threads.
    """
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


def make_parser() -> argparse.ArgumentParser:
    """Command line of all subcommands."""
    parser = argparse.ArgumentParser(description=__doc__, prog='benchmark.py')
    commands = parser.add_subparsers(dest='command', required=True)
    _add_layer_options(commands.add_parser('moe', help='one layer, beside other libraries'))
    _add_model_options(commands.add_parser('model', help='whole networks, beside a dense one'))
    _add_export_options(commands.add_parser('export', help='networks as ONNX and torch.export'))
    add = commands.add_parser('training', help='where a step of a config goes').add_argument
    add('config', help='config file')
    add('--iterations', type=int, default=20, help='to measure')
    add('--overhead', action='store_true', help='processor time that the runner adds, in its place')
    add('--cfg-options', nargs='+', action='extend', default=[], metavar='NAME=VALUE')
    add('--threads', type=int, default=2, help='CPU threads')
    add('--out', type=Path, metavar='FILE.json', help='save the run')
    add('--debug', action='store_true', help='show the full trace of an error')
    return parser


def _add_layer_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('--tokens', type=int, nargs='+', help='per image')
    add('--batch', type=int, nargs='+', help='images')
    add('--width', type=int, nargs='+', help='of tokens; experts are four times as wide')
    add('--experts', type=int, nargs='+')
    add('--top-k', type=int, nargs='+', help='experts per token')
    add('--dtype', nargs='+', choices=DTYPES)
    add('--skew', type=float, nargs='+', help='load of the fullest expert over the mean load')
    add('--contenders', nargs='+', metavar='NAME', help=f'of {", ".join(CONTENDERS)}')
    add('--mode', choices=('fwd', 'fwdbwd'), default='fwdbwd')
    add('--capacity-factor', type=float, help='of peers that have one (default: their own)')
    _add_common_options(parser, LAYER_PRESETS)


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('--models', nargs='+', metavar='NAME[,KEY=VALUE...]', help='timm names, with options')
    add('--baseline', help='what they are compared with')
    add('--batch', type=int, help='images')
    add('--img-size', type=int, help='side in pixels')
    add('--dtype', nargs='+', choices=DTYPES)
    add('--modes', nargs='+', choices=MODES)
    _add_common_options(parser, MODEL_PRESETS)


def _add_export_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('--models', nargs='+', metavar='NAME[,KEY=VALUE...]', help='default: every method')
    add('--baseline', default=BASELINE, help='what they are compared with')
    add('--batch', type=int, nargs='+', default=[1, 8], help='images')
    add('--ways', nargs='+', choices=WAYS, default=list(WAYS))
    add('--repeats', type=int, default=11, help='measurements of each')
    add('--out', type=Path, metavar='FILE.json', help='save the run')
    add('--debug', action='store_true', help='show the full trace of an error')


def _add_common_options(parser: argparse.ArgumentParser, presets: Mapping[str, Preset]) -> None:
    add = parser.add_argument
    add('--amp', action='store_true', default=None, help='autocast, where dtype is not float32')
    add('--preset', choices=presets, help='a set of configurations, in place of those above')
    add('--gate', action='store_true', help='exit with 1 if a limit of the preset is exceeded')
    add('--compiled', action='store_true', help='run ours and dense through torch.compile too')
    add('--threads', type=int, help='CPU threads (default: 2, or what the preset says)')
    add('--device', default='cpu', help="'cpu' or 'cuda'")
    add('--clock', choices=('wall', 'process'), help='process: CPU time of all threads')
    add('--repeats', type=int, help='measurements of each contender')
    add('--out', type=Path, metavar='FILE.json', help='save the run')
    add('--plot', type=Path, metavar='FILE.png', help='draw the run')
    add(
        '--from',
        dest='source',
        type=Path,
        metavar='FILE.json',
        help='draw or judge a saved run, run nothing',
    )
    add('--debug', action='store_true', help='show the full trace of an error')


def _main(args: argparse.Namespace, restart: bool) -> bool:
    if args.command == 'training':
        return _run_training(args, restart)
    if args.command == 'export':
        return _run_exports(args, restart)
    preset = _preset(args)
    if args.source is not None:
        return _use_saved(args, preset)
    settings = _settings(args, preset)
    if restart:
        restart_prepared(settings.threads)
    torch.set_num_threads(settings.threads)
    run: dict[str, Any] = {'command': args.command, 'header': describe_machine(settings.device)}
    run['settings'] = vars(settings)
    for name, value in {**run['header'], **run['settings']}.items():
        print(f'{name}: {value}')
    run['rows'], run['skipped'] = (_run_layers if args.command == 'moe' else _run_models)(
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
    if args.plot is not None:
        draw(saved, args.plot)
        print(f'wrote {args.plot}')
    if not args.gate:
        return True
    command = saved['command']
    check(command == args.command, '--from', str(args.source), f'a run of {args.command!r}')
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


def _run_layers(preset: Preset, settings: Settings) -> tuple[list[dict[str, Any]], list[Any]]:
    rows, skipped = [], []
    for cell, names in preset.runs:
        measured, absent = measure_layer(cell, settings, choose(names))
        print(layer_table(str(cell), measured, absent), flush=True)
        rows += measured
        skipped.append({'cell': vars(cell), 'reasons': absent})
    return rows, skipped


def _run_models(preset: Preset, settings: Settings) -> tuple[list[dict[str, Any]], list[Any]]:
    rows = []
    for comparison in preset.comparisons:
        measured = measure_networks(comparison, settings)
        print(network_table(str(comparison), measured), flush=True)
        rows += measured
    return rows, []


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
    if 'onnxruntime' in args.ways:
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


def _judged(rows: Sequence[Mapping[str, Any]], preset: Preset, args: argparse.Namespace) -> bool:
    verdicts = judge(preset.gates, rows)
    if verdicts:
        print('', *(verdict.text for verdict in verdicts), sep='\n')
    return not (args.gate or preset.always_gated) or not any(v.broken for v in verdicts)
