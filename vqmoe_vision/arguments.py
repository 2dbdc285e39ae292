"""The command lines of the tools, by the standard library: a typo is told before torch is there."""

import argparse
from pathlib import Path
from typing import Any

LAUNCHERS = ('none', 'pytorch', 'slurm', 'mpi')
WORK_DIR = Path('work_dirs/comparisons')
_DIGITS = 'vqmoe_vision::classification/digits/demo/vit_tiny_vqmoe_demo.py'
# What each tool does, in a line and in more, and what may stand behind its name.
TOOLS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    'train': ('Train the model of a config.',
              'The best checkpoint and the last one are kept. Several processes:\n'
              'torchrun --nproc_per_node=8 -m -- vqmoe_vision train CONFIG --launcher pytorch',
              (_DIGITS, 'CONFIG --cfg-options model.moe.top_k=1', 'CONFIG --resume')),
    'test': ('Test a checkpoint on the test data of its config.',
             'A segmentation may be augmented and drawn.',
             ('CONFIG a/epoch_40.pth --out scores.json', 'CONFIG b.pth --tta --show-dir pictures')),
    'predict': ('Classify or segment images that have no labels.',
                'A classifier writes predictions.json and .csv, a segmentor overlays/ and labels/.',
                ('CONFIG a/epoch_40.pth photo.jpg --topk 3', 'CONFIG b.pth photos/ --out-dir b')),
    'compare': ('Compare models over seeds, with tables and figures.',
                'An action has options of its own: vqmoe compare run --help.',
                ('run configs/comparisons/digits.py', 'control --quick')),
    'analyze': ('See what the experts of trained models do.', 'The report is a page for a browser.',
                ('CONFIG a/epoch_40.pth', 'CONFIG a/epoch_5.pth a/epoch_40.pth --shifts')),
    'export': ('Write a model as a file of ONNX or torch.export.',
               'What the file answers is compared with the model.',
               ('runs/a model.onnx', 'CONFIG a/epoch_40.pth model.pt2 --batch 8',
                'test_vit_vqmoe demo/ --web')),
    'publish': ('Write the model of a run for others.',
                'A work dir becomes a folder that timm and the Hugging Face hub read.\n'
                'A checkpoint becomes a smaller one, without optimizer and log.',
                ('runs/a my-model --license apache-2.0', 'a/epoch_40.pth model.pth')),
    'upcycle': ('Make a model with experts of a dense vision transformer.',
                'It is written as a folder that timm reads, with a report of every tensor.',
                ('vit_small_patch16_224.augreg_in21k_ft_in1k vit_small_vqmoe my-sparse',)),
    'convert_vmoe': ('Write a released V-MoE as a folder that timm reads.',
                     'The releases are those of github.com/google-research/vmoe, for JAX.',
                     ('vmoe_b16_imagenet21k_randaug_strong my-vmoe',)),
    'demo': ('Train two small models of digits, and draw them.',
             'Nothing is downloaded. Checkpoints, pictures and a report go to work_dirs/demo.',
             ('--quick',)),
}  # fmt: skip
ACTIONS = {
    'run': 'Work through all runs that have no results yet.',
    'table': 'Make tables and learning curves from the results.',
    'shifts': 'Test finished runs under the shifts that the comparison names.',
    'routing': 'Measure what the routing of finished runs is like.',
    'check': 'Repeat the first losses of runs that have results.',
    'export': 'Write the results as runs of a tracker.',
    'forest': 'Draw contrasts of several comparisons, and what they say together.',
    'pages': 'Make the tables of pages anew that stand between comments.',
    'control': 'See which router finds which structure, in tokens of known clusters.',
}
_SPECS, _PARTS = 'run table shifts routing check export', 'run shifts routing check export'
_FLAG, _LIST = {'action': 'store_true'}, {'nargs': '+', 'default': []}
_OPTIONS: dict[str, Any] = {**_LIST, 'action': 'extend', 'metavar': 'NAME=VALUE'}
# names, who takes them, help, and what else argparse is told
_ARGUMENTS: list[tuple[str, str, str, dict[str, Any]]] = [
    ('config', 'train test predict analyze',
     'A config file, or vqmoe_vision::NAME for one that comes with the package.', {}),
    ('checkpoint', 'test predict',
     'A file that train wrote, or a folder of timm that publish made of it.', {}),
    ('checkpoints', 'analyze', 'Files that train wrote; several of one run, the oldest first.',
     {'nargs': '+'}),
    ('checkpoint', 'convert_vmoe', 'The path of its files without .index and .data-*.', {}),
    ('images', 'predict', 'Image files, or folders of images.', {'nargs': '+'}),
    ('source', 'export', 'A config, a work dir, a timm model, or local-dir:FOLDER of publish.', {}),
    ('checkpoint', 'export', 'Weights (default: its own; of a work dir the best or the last).',
     {'nargs': '?'}),
    ('source', 'publish', 'A work dir of train, or a checkpoint of it.', {}),
    ('source', 'upcycle', 'A timm model, hf-hub:NAME, local-dir:FOLDER, or a file of weights.', {}),
    ('model', 'upcycle', 'The name of a model with experts, such as vit_small_vqmoe.', {}),
    ('out', 'export', 'The file to write, NAME.onnx or NAME.pt2; a new folder with --web.', {}),
    ('out', 'publish',
     'The folder to write; of a checkpoint NAME.pth, which gets 8 digits of its sha256.', {}),
    ('out', 'upcycle convert_vmoe', 'The folder to write, which is new or empty.', {}),
    ('--work-dir', 'train test', 'Where logs and checkpoints go (default: work_dirs/NAME).', {}),
    ('--resume', 'train', 'Go on from the newest checkpoint in the work dir.', _FLAG),
    ('--amp', 'train', 'Train in mixed precision: bfloat16, float16 on an older GPU.', _FLAG),
    ('--out', 'test', 'Write scores and routing to this JSON file.', {'type': Path}),
    ('--show-dir', 'test', 'Write predictions over their images to this folder.', {}),
    ('--tta', 'test', "Augment the test as the config's tta_pipeline says.", _FLAG),
    ('--launcher', 'train test', 'What has started several processes; pytorch is torchrun.',
     {'choices': LAUNCHERS, 'default': 'none'}),
    # torchrun sets the variable; torch.distributed.launch passes the option
    ('--local_rank --local-rank', 'train test', argparse.SUPPRESS, {'type': int, 'default': 0}),
    ('--log', 'train test', 'Show a bar, as on a terminal, or all lines of the log.',
     {'choices': ('bar', 'plain')}),
    ('--out-dir', 'predict', 'Where predictions go.',
     {'type': Path, 'default': Path('work_dirs/predictions')}),
    ('--topk', 'predict', 'How many classes a classifier names (default: 5).', {'type': int}),
    ('--opacity', 'predict', 'Of the colours of a segmentation, 0 to 1 (default: 0.5).',
     {'type': float}),
    ('--beside', 'analyze', 'Look at another model on the same images; may be repeated.',
     {'nargs': 2, 'action': 'append', 'default': [], 'metavar': ('CONFIG', 'CHECKPOINT')}),
    ('--images', 'analyze', "A folder of images, in place of the config's test images.", {}),
    ('--num-images', 'analyze', 'Look at so many, drawn from all.', {'type': int, 'default': 1000}),
    ('--batch-size', 'analyze', 'Images at a time.', {'type': int, 'default': 32}),
    ('--shifts', 'analyze', 'Also count tokens that change their expert under corruptions.', _FLAG),
    ('--out', 'analyze', 'The folder for report.html and numbers.json.',
     {'type': Path, 'default': Path('work_dirs/analysis')}),
    ('--device', 'predict analyze', 'Where to run (default: a GPU if there is one).', {}),
    ('--size', 'export', 'Of the images of a segmentor in pixels (default: its window).',
     {'type': int, 'nargs': 2, 'metavar': ('H', 'W')}),
    ('--batch', 'export', 'Images per call (default: any number).', {'type': int}),
    ('--opset', 'export', "The opset of ONNX (default: that of torch's exporter).", {'type': int}),
    ('--int8', 'export', 'Compute linear layers in int8, those of the experts included.', _FLAG),
    ('--web', 'export', 'Write a page that shows the routing in a browser; needs npm.', _FLAG),
    ('--checkpoint', 'publish', 'Of the work dir (default: the best, or else the last).',
     {'metavar': 'FILE'}),
    ('--license', 'publish', "The hub's name of it, such as apache-2.0.", {'metavar': 'ID'}),
    ('--numbers', 'publish', 'The JSON file that test --out wrote.', {'metavar': 'FILE'}),
    ('--seed', 'upcycle', 'Of what is drawn anew, such as routers (default: 0).',
     {'type': int, 'default': 0}),
    ('--without-head', 'convert_vmoe', 'Leave out the classifier, for the features.', _FLAG),
    ('--cfg-options', 'train test predict analyze export',
     'Change fields of the config: train_cfg.max_epochs=5 model.moe.top_k=1.', _OPTIONS),
    ('--cfg-options', 'upcycle', 'Of timm.create_model: num_experts=8 upcycling.drop=0.5.',
     _OPTIONS),
    ('--cfg-options', 'convert_vmoe', 'What no file says (default: top_k=2).', _OPTIONS),
    ('--quick', 'demo', 'Train for a tenth as long: the scores are low.', _FLAG),
]  # fmt: skip
_OF_COMPARE: list[tuple[str, str, str, dict[str, Any]]] = [
    ('spec', _SPECS, 'A file in configs/comparisons, or a config.', {}),
    ('specs', 'forest', 'Files in configs/comparisons.', {'nargs': '+', 'metavar': 'SPEC'}),
    ('pages', 'pages', 'Pages.', {'nargs': '+', 'type': Path, 'metavar': 'FILE.md'}),
    ('--rows', _PARTS, 'Only these rows.', {'nargs': '+', 'metavar': 'ROW'}),
    ('--separation', 'control', 'How far clusters are apart.',
     {'nargs': '+', 'type': float, 'metavar': 'S'}),
    ('--seeds', f'{_PARTS} control', 'Only these seeds.',
     {'nargs': '+', 'type': int, 'metavar': 'SEED'}),
    ('--methods', 'control', 'Only these rows.', {**_LIST, 'metavar': 'ROW'}),
    ('--images', 'control', 'Scenes of digits whose patches lie in hidden domains.', _FLAG),
    ('--generator', 'control', 'Number, sizes and positions of clusters (default: clusters_8).',
     {'nargs': '+', 'metavar': 'NAME'}),
    ('--quick', 'control', 'Less of both: one seed.', _FLAG),
    ('--work-dir', _SPECS, 'Where runs are.', {'type': Path, 'default': WORK_DIR}),
    ('--results', f'{_SPECS} forest pages', 'Where rows and tables are.',
     {'type': Path, 'default': Path('docs/results')}),
    ('--jobs', 'run', 'Runs at a time (default: one, or one per GPU).', {'type': int}),
    ('--executor', 'run', 'Train each run as a job of submitit, here or on a cluster of Slurm.',
     {'choices': ('local', 'slurm')}),
    ('--processes-per-run', 'run', 'Of a job, with a GPU each where there are some (default: 1).',
     {'type': int, 'metavar': 'N'}),
    ('--minutes', 'run', 'Limit of a job, which then comes again and goes on; Slurm needs one.',
     {'type': int}),
    ('--slurm', 'run', 'Options of sbatch: mem=64GB partition=gpu.',
     {'nargs': '+', 'metavar': 'NAME=VALUE'}),
    ('--images', 'table', 'Also write figures of documents here.', {'type': Path}),
    ('--to', 'export', 'The tracker.', {'choices': ('trackio',), 'required': True}),
    ('--sample', 'check', 'Only N rows, drawn at random.', {'type': int, 'metavar': 'N'}),
    ('--contrasts', 'forest', 'Further contrasts, such as "vqmoe_official - smoe".',
     {'nargs': '+', 'metavar': 'CONTRAST'}),
    ('--out', 'forest', 'The figure.',
     {'type': Path, 'default': WORK_DIR / 'forest.png', 'metavar': 'FILE.png'}),
    ('--out', 'control', 'Scores, with a figure beside them.',
     {'type': Path, 'metavar': 'FILE.json'}),
]  # fmt: skip


def parser_of(tool: str) -> argparse.ArgumentParser:
    """The parser of a tool."""
    return fill(argparse.ArgumentParser(), tool)


def fill(parser: argparse.ArgumentParser, tool: str) -> argparse.ArgumentParser:
    """Adds to a parser all that a tool takes, and its help."""
    line, more, examples = TOOLS[tool]
    shown = ''.join(f'\n  vqmoe {tool} {example}' for example in examples)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = f'{line}\n\n{more}', f'examples:{shown}'
    if tool == 'compare':
        actions = parser.add_subparsers(required=True, metavar='ACTION', dest='action')
        for action, text in ACTIONS.items():
            one = actions.add_parser(action, help=text, description=text)
            # of a table p is corrected for all rows, whatever is looked at
            one.set_defaults(rows=None, seeds=None, work_dir=WORK_DIR)
            _add(one, action, _OF_COMPARE)
    _add(parser, tool, _ARGUMENTS)
    return parser


def _add(parser: argparse.ArgumentParser, taker: str, arguments: list) -> None:
    for names, takers, text, options in arguments:
        if taker in takers.split():
            parser.add_argument(*names.split(), help=text, **options)
    parser.add_argument('--debug', action='store_true', help='Show the full trace of an error.')
