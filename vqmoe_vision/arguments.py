"""The command lines of the tools, by the standard library: a typo is told before torch is there.

A tool is a function whose docstring is its help: what it does, and below that examples.
"""

import argparse
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

Parser = argparse.ArgumentParser
LAUNCHERS = ('none', 'pytorch', 'slurm', 'mpi')
WORK_DIR = Path('work_dirs/comparisons')
_FIELDS = 'Change fields of the config, such as train_cfg.max_epochs=5 model.moe.top_k=1.'
_CONFIG = 'A config file, or vqmoe_vision::NAME for one that comes with the package.'
_CHECKPOINT = 'A file that train wrote, or a folder of timm that publish made of it.'
_DEVICE = 'Where to run (default: a GPU if there is one).'


def parser_of(tool: str) -> Parser:
    """The parser of a tool."""
    return describe(Parser(formatter_class=_Formatter), tool)


def describe(parser: Parser, tool: str) -> Parser:
    """Adds to a parser all that a tool takes, and its help."""
    parser.description, _, parser.epilog = inspect.cleandoc(TOOLS[tool].__doc__ or '').partition(
        '\n\n'
    )
    TOOLS[tool](parser)
    add_debug(parser)
    return parser


def add_debug(parser: Parser) -> None:
    """Adds what every tool takes."""
    parser.add_argument('--debug', action='store_true', help='Show the full trace of an error.')


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Examples stay on their lines; help has the width of the terminal, at most 100."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)


def _add_options(parser: Parser, text: str = _FIELDS) -> None:
    parser.add_argument(
        '--cfg-options', nargs='+', action='extend', metavar='NAME=VALUE', default=[], help=text
    )


def _add_run(parser: Parser) -> None:
    add = parser.add_argument
    add('config', help=_CONFIG)
    add('--work-dir', help='Where logs and checkpoints go (default: work_dirs/NAME of the config).')
    _add_options(parser)
    text = 'What has started several processes, as torchrun does for pytorch.'
    add('--launcher', choices=LAUNCHERS, default='none', help=text)
    # torchrun sets the variable; torch.distributed.launch passes the option
    add('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    text = 'Show a bar, as on a terminal, or all lines of the log.'
    add('--log', choices=('bar', 'plain'), help=text)


def train(parser: Parser) -> None:
    """Train the model of a config.

    The best checkpoint of the validations is kept, and the last one.

    Examples:
      vqmoe train vqmoe_vision::classification/digits/demo/vit_tiny_vqmoe_demo.py
      vqmoe train CONFIG --work-dir runs/a --cfg-options model.model_name=vit_tiny_smoe
      vqmoe train CONFIG --work-dir runs/a --resume
      torchrun --standalone --nproc_per_node=8 -m vqmoe_vision train CONFIG --launcher pytorch
    """
    _add_run(parser)
    text = 'Go on from the newest checkpoint in the work dir.'
    parser.add_argument('--resume', action='store_true', help=text)
    text = 'Train in mixed precision: bfloat16, or float16 on an older GPU.'
    parser.add_argument('--amp', action='store_true', help=text)


def test(parser: Parser) -> None:
    """Test a checkpoint on the test data of its config.

    Examples:
      vqmoe test CONFIG runs/a/epoch_40.pth --out scores.json
      vqmoe test CONFIG runs/a/iter_160000.pth --tta --show-dir pictures
    """
    _add_run(parser)
    add = parser.add_argument
    add('checkpoint', help=_CHECKPOINT)
    add('--out', type=Path, help='Write scores and routing to this JSON file.')
    add('--show-dir', help='Write predictions over their images to this folder.')
    add('--tta', action='store_true', help="Augment the test as the config's tta_pipeline says.")


def predict(parser: Parser) -> None:
    """Classify or segment images that have no labels.

    Examples:
      vqmoe predict CONFIG runs/a/epoch_40.pth photo.jpg --topk 3
      vqmoe predict CONFIG runs/b/iter_160000.pth photos/ --out-dir overlays
    """
    add = parser.add_argument
    add('config', help=_CONFIG)
    add('checkpoint', help=_CHECKPOINT)
    add('images', nargs='+', help='Image files, or folders of images.')
    text = 'Gets predictions.json and predictions.csv, or overlays/NAME.png and labels/NAME.png.'
    add('--out-dir', type=Path, default=Path('work_dirs/predictions'), help=text)
    add('--device', help=_DEVICE)
    add('--topk', type=int, help='How many classes a classifier names (default: 5).')
    add('--opacity', type=float, help='Of the colours of a segmentation, 0 to 1 (default: 0.5).')
    _add_options(parser)


def compare(parser: Parser) -> None:
    """Compare models over seeds, with tables and figures.

    Examples:
      vqmoe compare run vqmoe_vision::comparisons/digits.py
      vqmoe compare table vqmoe_vision::comparisons/digits.py
      vqmoe compare control --quick
    """
    actions = parser.add_subparsers(required=True, metavar='ACTION', dest='action')
    for action, text in ACTIONS.items():
        one = actions.add_parser(action, help=text, description=text)
        # of a table p is corrected for all rows, whatever is looked at
        one.set_defaults(rows=None, seeds=None, work_dir=WORK_DIR)
        for name, of, options in _ARGUMENTS:
            if action in of.split():
                one.add_argument(name, **options)
        add_debug(one)


ACTIONS = {
    'run': 'Work through all runs that have no results yet.',
    'table': 'Make tables and learning curves from the results.',
    'shifts': 'Test finished runs under the shifts that the comparison names.',
    'routing': 'Measure what the routing of finished runs is like.',
    'check': 'Repeat the first losses of runs that have results.',
    'forest': 'Draw contrasts of several comparisons, and what they say together.',
    'control': 'See which router finds which structure, in tokens of known clusters.',
}
_SPECS, _PARTS = 'run table shifts routing check', 'run shifts routing check'
# arguments, the actions that take them, and what argparse is told
_ARGUMENTS: list[tuple[str, str, Any]] = [
    ('spec', _SPECS, {'help': 'A file in configs/comparisons, or a config.'}),
    ('specs', 'forest', {'nargs': '+', 'metavar': 'SPEC', 'help': 'Files in configs/comparisons.'}),
    ('--rows', _PARTS, {'nargs': '+', 'metavar': 'ROW', 'help': 'Only these rows.'}),
    ('--separation', 'control', {'nargs': '+', 'type': float, 'metavar': 'S',
                                 'help': 'How far clusters are apart.'}),
    ('--seeds', f'{_PARTS} control', {'nargs': '+', 'type': int, 'metavar': 'SEED',
                                      'help': 'Only these seeds.'}),
    ('--methods', 'control', {'nargs': '+', 'default': [], 'metavar': 'ROW',
                              'help': 'Only these rows.'}),
    ('--quick', 'control', {'action': 'store_true', 'help': 'Two separations and one seed.'}),
    ('--work-dir', _SPECS, {'type': Path, 'default': WORK_DIR, 'help': 'Where runs are.'}),
    ('--results', f'{_SPECS} forest', {'type': Path, 'default': Path('docs/results'),
                                       'help': 'Where rows and tables are.'}),
    ('--jobs', 'run', {'type': int, 'help': 'Runs at a time (default: one, or one per GPU).'}),
    ('--images', 'table', {'type': Path, 'help': 'Also write figures of documents here.'}),
    ('--sample', 'check', {'type': int, 'metavar': 'N', 'help': 'Only N rows, drawn at random.'}),
    ('--out', 'forest', {'type': Path, 'default': WORK_DIR / 'forest.png', 'metavar': 'FILE.png',
                         'help': 'The figure.'}),
    ('--out', 'control', {'type': Path, 'metavar': 'FILE.json',
                          'help': 'Scores, with a figure beside them.'}),
]  # fmt: skip


def analyze(parser: Parser) -> None:
    """See what the experts of trained models do.

    Examples:
      vqmoe analyze CONFIG runs/a/epoch_40.pth --out report
      vqmoe analyze CONFIG runs/a/epoch_5.pth runs/a/epoch_40.pth --shifts
    """
    add = parser.add_argument
    add('config', help=_CONFIG)
    text = 'Files that train wrote; several of one run, the oldest first.'
    add('checkpoints', nargs='+', help=text)
    text = 'Look at another model on the same images; may be repeated.'
    pair = ('CONFIG', 'CHECKPOINT')
    add('--beside', nargs=2, action='append', default=[], metavar=pair, help=text)
    add('--images', help="A folder of images, in place of the config's test images.")
    add('--num-images', type=int, default=1000, help='Look at so many, drawn from all.')
    add('--batch-size', type=int, default=32, help='Images at a time.')
    text = 'Also count tokens that change their expert under crops, flips, noise and corruptions.'
    add('--shifts', action='store_true', help=text)
    text = 'The folder for report.html and numbers.json.'
    add('--out', type=Path, default=Path('work_dirs/analysis'), help=text)
    add('--device', help=_DEVICE)
    _add_options(parser)


def export(parser: Parser) -> None:
    """Write a model as a file of ONNX or torch.export.

    What the file answers is compared with the model.

    Examples:
      vqmoe export runs/a model.onnx
      vqmoe export CONFIG runs/a/epoch_40.pth model.pt2 --batch 8
    """
    add = parser.add_argument
    text = 'A config, a work dir of train, a timm model, or local-dir:FOLDER of publish.'
    add('source', help=text)
    text = 'Weights of the config or the name (default: its own; of a work dir the best or last).'
    add('checkpoint', nargs='?', help=text)
    add('out', help='The file to write, NAME.onnx or NAME.pt2.')
    text = 'Size of the images of a segmentor in pixels (default: its window).'
    add('--size', type=int, nargs=2, metavar=('H', 'W'), help=text)
    add('--batch', type=int, help='Images per call (default: any number).')
    add('--opset', type=int, help="The opset of ONNX (default: that of torch's exporter).")
    text = 'Compute linear layers in int8, those of the experts included.'
    add('--int8', action='store_true', help=text)
    _add_options(parser)


def publish(parser: Parser) -> None:
    """Write the model of a run for others.

    A work dir becomes a folder that timm and the Hugging Face hub read. A checkpoint becomes a
    smaller one, with weights, config and classes, without optimizer and log.

    Examples:
      vqmoe publish runs/a my-model --license apache-2.0
      vqmoe publish runs/a/epoch_40.pth model.pth
    """
    add = parser.add_argument
    add('source', help='A work dir of train, or a checkpoint of it.')
    text = 'The folder to write; of a checkpoint NAME.pth, written as NAME-<8 digits of sha256>.pth'
    add('out', help=text)
    text = 'Which checkpoint of the work dir (default: the best, or else the last).'
    add('--checkpoint', metavar='FILE', help=text)
    add('--license', metavar='ID', help="The hub's name of the licence, such as apache-2.0.")
    add('--numbers', metavar='FILE', help='The JSON file that test --out wrote.')


def upcycle(parser: Parser) -> None:
    """Make a model with experts of a dense vision transformer.

    It is written as a folder that timm reads, with a report of every tensor.

    Examples:
      vqmoe upcycle vit_small_patch16_224.augreg_in21k_ft_in1k vit_small_vqmoe my-sparse
      vqmoe upcycle local-dir:FOLDER vit_small_smoe my-sparse --cfg-options num_experts=4
    """
    add = parser.add_argument
    text = 'The name of a timm model, hf-hub:NAME, local-dir:FOLDER, or a file of weights.'
    add('source', help=text)
    add('model', help='The name of a model with experts, such as vit_small_vqmoe.')
    add('out', help='The folder to write, which does not exist yet or is empty.')
    text = 'Seed of what is drawn anew, such as routers (default: 0).'
    add('--seed', type=int, default=0, help=text)
    text = 'Arguments of timm.create_model, such as num_experts=8 upcycling.drop=0.5 img_size=32.'
    _add_options(parser, text)


def convert_vmoe(parser: Parser) -> None:
    """Write a released V-MoE as a folder that timm reads.

    The releases are those of github.com/google-research/vmoe, for JAX.

    Examples:
      vqmoe convert_vmoe vmoe_b16_imagenet21k_randaug_strong my-vmoe
    """
    add = parser.add_argument
    text = 'The path of its files without .index and .data-00000-of-00008.'
    add('checkpoint', help=text)
    add('out', help='The folder to write.')
    text = 'Leave out the classifier, for the features.'
    add('--without-head', action='store_true', help=text)
    text = 'Say what no file says, such as top_k=2 eval_capacity_factor=1.5 (default: top_k=2).'
    _add_options(parser, text)


def demo(parser: Parser) -> None:
    """Train two small models of digits, and draw them.

    Nothing is downloaded. Checkpoints, pictures and a report go to work_dirs/demo.

    Examples:
      vqmoe demo --quick
    """
    text = 'Train for a tenth as long: the pictures are there, the scores are low.'
    parser.add_argument('--quick', action='store_true', help=text)


TOOLS: dict[str, Callable[[Parser], None]] = {
    f.__name__: f
    for f in (
        *(train, test, predict, compare, analyze, export, publish, upcycle),
        *(convert_vmoe, demo),
    )
}
