"""The command line of `tools/benchmark.py`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from .cells import DTYPES
from .exported import BASELINE, WAYS
from .layers import CONTENDERS
from .model_presets import MODEL_PRESETS
from .networks import MODES
from .presets import LAYER_PRESETS, Preset
from .scaling import PROCESSES, SMALL
from .scaling_costs import Cluster
from .tune import CONSTANTS


def make_parser() -> argparse.ArgumentParser:
    """Command line of all subcommands."""
    parser = argparse.ArgumentParser(description=__doc__, prog='benchmark.py')
    commands = parser.add_subparsers(dest='command', required=True)
    _add_layer_options(commands.add_parser('moe', help='one layer, beside other libraries'))
    _add_model_options(commands.add_parser('model', help='whole networks, beside a dense one'))
    _add_export_options(commands.add_parser('export', help='networks as ONNX and torch.export'))
    add = commands.add_parser('gpu', help='whether a card is right, and how fast').add_argument
    add('--device', default='cuda', help="'cuda', or another one by number, 'cuda:1'")
    add('--out', type=Path, metavar='FILE.json', default=Path('gpu-check.json'), help='the row')
    add('--gate', action='store_true', help='exit with 1 if a ratio is above its limit')
    add('--debug', action='store_true', help='show the full trace of an error')
    add = commands.add_parser('training', help='where a step of a config goes').add_argument
    add('config', help='config file')
    add('--iterations', type=int, default=20, help='to measure')
    add('--overhead', action='store_true', help='processor time that the runner adds, in its place')
    add('--cfg-options', nargs='+', action='extend', default=[], metavar='NAME=VALUE')
    add('--threads', type=int, default=2, help='CPU threads')
    add('--out', type=Path, metavar='FILE.json', help='save the run')
    add('--debug', action='store_true', help='show the full trace of an error')
    _add_tune_options(commands.add_parser('tune', help='measured constants of the CPU kernel'))
    _add_data_options(commands.add_parser('data', help='images per second of one worker'))
    _add_scaling_options(commands.add_parser('scaling', help='what many processes send and keep'))
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


def _add_tune_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('--constants', nargs='+', metavar='NAME', help=f'of {", ".join(CONSTANTS)}')
    add('--threads', type=int, default=2, help='CPU threads')
    clocks = 'process: CPU time of all threads (default on one thread), wall (default on more)'
    add('--clock', choices=('wall', 'process'), help=clocks)
    add('--repeats', type=int, default=15, help='measurements of each value')
    add('--out', type=Path, metavar='FILE.json', help='save the run')
    add('--debug', action='store_true', help='show the full trace of an error')


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('config', help='config file')
    add('--images', type=int, default=256, help='to measure, or some more: whole batches')
    add('--cfg-options', nargs='+', action='extend', default=[], metavar='NAME=VALUE')
    add('--out', type=Path, metavar='FILE.json', help='save the run')
    add('--debug', action='store_true', help='show the full trace of an error')


def _add_scaling_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('--model', metavar='NAME[,KEY=VALUE...]', help=f'what is measured (default: {SMALL})')
    numbers = ' '.join(map(str, PROCESSES))
    add('--processes', type=int, nargs='+', help=f'how many start here (default: {numbers})')
    add('--batch', type=int, help='images per process (default: 8, of --model-only 64)')
    add('--model-only', action='store_true', help='start none: ViT-B and ViT-L by formula')
    assumed = Cluster()
    for name, value, text in (
        ('--inside', assumed.inside / 1e9, 'GB/s of a GPU to others of its machine'),
        ('--between', assumed.between / 1e9, 'GB/s of a machine to others'),
        ('--teraflops', assumed.flops / 1e12, 'of a GPU at its best'),
    ):
        add(name, type=float, help=f'{text}, with --model-only (default: {value:g})')
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
