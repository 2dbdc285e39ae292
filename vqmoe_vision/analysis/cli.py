"""What `tools/analyze.py` does."""

import argparse
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vqmoe_vision.engine.checkpoint import read_content
from vqmoe_vision.engine.cli import CONFIG_HELP, load_config, make_folder, run
from vqmoe_vision.engine.config import add_config_options
from vqmoe_vision.engine.model import load_trained
from vqmoe_vision.engine.record import FILE, read_history
from vqmoe_vision.moe.config import check

from .report import write_report
from .shifts import Change, all_shifts, convergence, layer_states, routing_changes
from .source import images_of, source_of
from .survey import survey


def analyze(argv: Sequence[str] | None = None) -> None:
    """Writes a report of the routing of trained models."""
    parser = argparse.ArgumentParser(description='See what the experts of trained models do.')
    add = parser.add_argument
    add('config', help=CONFIG_HELP)
    text = 'files written by tools/train.py; several of one run, oldest first'
    add('checkpoints', nargs='+', help=text)
    text = 'another model to look at on the same images; may be repeated'
    pair = ('CONFIG', 'CHECKPOINT')
    add('--beside', nargs=2, action='append', default=[], metavar=pair, help=text)
    add('--images', help="folder of images, in place of the config's test images")
    add('--num-images', type=int, default=1000, help='look at so many, drawn from all')
    add('--batch-size', type=int, default=32)
    text = 'also how many tokens change their expert under crops, flips, noise and corruptions'
    add('--shifts', action='store_true', help=text)
    text = 'folder for report.html and numbers.json'
    add('--out', type=Path, default=Path('work_dirs/analysis'), help=text)
    add('--device', help='where to run (default: a GPU if there is one)')
    add_config_options(parser)
    run(parser, argv, _analyze)


def _analyze(args: argparse.Namespace) -> None:
    check(args.num_images >= 1, '--num-images', args.num_images, 'at least 1')
    check(args.batch_size >= 1, '--batch-size', args.batch_size, 'at least 1')
    own = load_config(args.config, args.cfg_options)
    files = [(own, checkpoint) for checkpoint in args.checkpoints]
    files += [(load_config(config), checkpoint) for config, checkpoint in args.beside]
    names = [path for _, path in files]
    check(len(set(names)) == len(names), 'checkpoints', names, 'none of them twice')
    titles = ['/'.join(Path(path).with_suffix('').parts[-2:]) for path in names]
    trained = dict(zip(names if len({*titles}) < len(titles) else titles, files, strict=True))
    if len(args.checkpoints) > 1:
        _check_order(args.checkpoints)
    make_folder(args.out)
    surveys, changes, states = [], [], []
    before: Any = None
    for number, (title, (config, path)) in enumerate(trained.items()):
        model = load_trained(config, path, args.device)
        source = source_of(model, config, args.num_images, args.images)
        total = -(-len(source.names) // args.batch_size)  # more where sizes of images differ
        seen = survey(
            model.routed_model,
            tqdm(source.batches(args.batch_size), title, total, unit='batch'),
            title=title,
            normalization=source.normalization,
            classes=source.classes,
            names=source.names,
            shifts=all_shifts() if args.shifts else (),
        )
        surveys.append(seen)
        if number < len(args.checkpoints):
            states.append(layer_states(model.routed_model))
            if number:
                batches = tqdm(source.batches(args.batch_size), 'changes', total, unit='batch')
                both = before.routed_model, model.routed_model
                shares = routing_changes(*both, map(images_of, batches))
                changes.append(Change(surveys[-2].title, title, shares))
            before = model
    runs = {title: Path(path).parent / FILE for title, (_, path) in trained.items()}
    # the history of a run belongs to all of its checkpoints
    first = {file: title for title, file in reversed(runs.items()) if file.is_file()}
    history = {title: read_history(file) for file, title in first.items()}
    # of two, one is the start and one the end
    converged = convergence(states, surveys[0].layers) if len(states) > 2 and states[0] else None
    print(write_report(surveys, args.out, history, changes, converged)[0])


def _check_order(paths: Sequence[str]) -> None:
    """Refuses checkpoints of other trainings and other orders, as far as they say what they are."""
    # checksums are compared when the weights are loaded
    metas = [read_content(path, verify=False).get('meta') or {} for path in paths]
    for (first, earlier), (path, later) in pairwise(zip(paths, metas, strict=True)):
        allowed = f'of the training of {first} and after it, the oldest first'
        same = earlier.get('seed') == later.get('seed', earlier.get('seed'))
        check(same or 'seed' not in earlier, f'{path}: seed', later.get('seed'), allowed)
        if 'iter' in earlier and 'iter' in later:
            check(earlier['iter'] < later['iter'], f'{path}: iter', later['iter'], allowed)
