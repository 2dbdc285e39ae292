"""What `tools/benchmark.py` does."""

import argparse
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from vqmoe_vision.moe.config import check

from .cells import DTYPES, Cell, Settings
from .environment import describe_machine
from .gates import judge
from .gpu import run_gpu
from .layers import CONTENDERS, choose, run_layers
from .networks import MODES, Comparison, run_networks
from .presets import LAYER_PRESETS, NETWORK_PRESETS, Preset
from .report import LIMIT_COLUMNS, table, write
from .restart import restart_prepared
from .timing import use_device

# options that a preset decides, with their values in a run without one
LAYER_GRID = dict[str, Any](tokens=[197], batch=[8], width=[384], experts=[8], top_k=[1])
LAYER_GRID |= {'dtype': ['float32'], 'skew': [1.0], 'amp': False, 'contenders': None}
DENSE = 'vit_small_patch16_224'
NETWORK_GRID = dict[str, Any](models=['vit_small_smoe,top_k=1'], baseline=DENSE, batch=8)
NETWORK_GRID |= {'img_size': 224, 'dtype': ['float32'], 'amp': False, 'modes': list(MODES)}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, prog='benchmark.py')
    commands = parser.add_subparsers(dest='command', required=True)
    layers = commands.add_parser('moe', help='one layer, beside other libraries')
    networks = commands.add_parser('model', help='whole networks, beside a dense one')
    gpu = commands.add_parser('gpu', help='whether a card is right, and how fast')

    add = layers.add_argument
    add('--tokens', type=int, nargs='+', help='per image')
    add('--batch', type=int, nargs='+', help='images')
    add('--width', type=int, nargs='+', help='of tokens; experts are four times as wide')
    add('--experts', type=int, nargs='+')
    add('--top-k', type=int, nargs='+', help='experts per token')
    add('--dtype', nargs='+', choices=DTYPES)
    add('--skew', type=float, nargs='+', help='load of the fullest expert over the mean load')
    add('--contenders', nargs='+', metavar='NAME', help=f'of {", ".join(CONTENDERS)}')
    add('--mode', choices=('fwd', 'fwdbwd'), default='fwdbwd')

    add = networks.add_argument
    add('--models', nargs='+', metavar='NAME[,KEY=VALUE...]', help='timm names, with options')
    add('--baseline', help='what they are compared with')
    add('--batch', type=int, help='images')
    add('--img-size', type=int, help='side in pixels')
    add('--dtype', nargs='+', choices=DTYPES)
    add('--modes', nargs='+', choices=MODES)

    for command, presets in ((layers, LAYER_PRESETS), (networks, NETWORK_PRESETS)):
        add = command.add_argument
        add('--amp', action='store_true', default=None, help='autocast, but for float32')
        add('--preset', choices=presets, help='a set of configurations, in place of those above')
        add('--compiled', action='store_true', help='run ours and dense through torch.compile too')
        add('--threads', type=int, help='CPU threads (default: 2, or what the preset says)')
        add('--device', default='cpu', help="'cpu' or 'cuda'")
        add('--clock', choices=('wall', 'process'), help='process: CPU time of all threads')
        add('--repeats', type=int, help='measurements of each contender')
        add('--out', type=Path, metavar='FILE.json', help='save the run')

    add = gpu.add_argument
    add('--device', default='cuda', help="'cuda', or another one by number, 'cuda:1'")
    add('--out', type=Path, metavar='FILE.json', default=Path('gpu-check.json'), help='the row')
    for command in (layers, networks, gpu):
        command.add_argument('--gate', action='store_true', help='exit with 1 if a limit is missed')
        command.add_argument('--debug', action='store_true', help='show the trace of an error')
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Benchmarks layers or models; a mistake is one line unless `--debug`."""
    args = make_parser().parse_args(argv)
    try:
        finished = run_gpu(args) if args.command == 'gpu' else _run(args, restart=argv is None)
    except Exception as error:
        if args.debug:
            raise
        text = ' '.join(str(error).split())
        known = isinstance(error, ValueError | OSError | ImportError | RuntimeError)
        sys.exit(f'error: {text}' if known else f'error: {type(error).__name__}: {text}')
    if not finished:
        sys.exit(1)


def _run(args: argparse.Namespace, restart: bool) -> bool:
    """Whether all limits that the run is held to are met."""
    preset = _preset(args)
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
    if args.command == 'moe':
        run['rows'], run['skipped'] = run_layers(preset.runs, settings)
    else:
        run['rows'] = run_networks(preset.comparisons, settings)
    if args.out is not None:
        write(args.out, run)
    limits = judge(preset.gates, run['rows'])
    if limits:
        print('', table(limits, LIMIT_COLUMNS), sep='\n')
    held = args.gate or preset.always_gated
    return not held or all(row['result'] == 'met' for row in limits)


def _preset(args: argparse.Namespace) -> Preset:
    """The named preset, or one that holds what the options ask for."""
    grid = LAYER_GRID if args.command == 'moe' else NETWORK_GRID
    given = {name: getattr(args, name) for name in grid if getattr(args, name) is not None}
    if args.preset is not None:
        clash = sorted(f'--{name.replace("_", "-")}' for name in given)
        check(not clash, '--preset', args.preset, f'only without {", ".join(clash)}')
        preset = (LAYER_PRESETS if args.command == 'moe' else NETWORK_PRESETS)[args.preset]
        gated = args.gate or preset.always_gated
        # where all contenders run, peers are among them, and ours must not be slower
        limits = preset.gates or any(names is None for _, names in preset.runs)
        check(bool(limits) or not gated, '--gate', args.gate, 'only with a preset that has limits')
        forward_only = args.command == 'moe' and args.mode == 'fwd'
        check(not (forward_only and gated), '--mode', 'fwd', 'fwdbwd where limits are judged')
        return preset
    check(not args.gate, '--gate', args.gate, 'only with --preset, which has the limits')
    chosen = {**grid, **given}
    amp = chosen.pop('amp')
    if args.command == 'model':
        dtypes = chosen.pop('dtype')
        chosen.update(models=tuple(chosen['models']), modes=tuple(chosen['modes']))
        comparisons = (Comparison(**chosen, dtype=d, amp=amp and d != 'float32') for d in dtypes)
        return Preset(comparisons=tuple(comparisons))
    names = choose(chosen.pop('contenders'))
    cells = [dict(zip(chosen, values, strict=True)) for values in product(*chosen.values())]
    cells = [{**cell, 'amp': amp and cell['dtype'] != 'float32'} for cell in cells]
    return Preset(runs=tuple((Cell(**cell), names) for cell in cells))


def _settings(args: argparse.Namespace, preset: Preset) -> Settings:
    return Settings(
        device=args.device,
        threads=preset.threads if args.threads is None else args.threads,
        clock=args.clock or preset.clock,
        repeats=preset.repeats if args.repeats is None else args.repeats,
        backward=args.command == 'model' or args.mode == 'fwdbwd',
        compiled=args.compiled or preset.compiled,
    )
