"""What `tools/publish.py` does: a run's model as timm's folder, or a checkpoint of ours."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from vqmoe_vision.models.compat import STATED
from vqmoe_vision.models.weights import digest_of

from .checkpoint import read_content
from .checkpoint_files import SaveError, reason_of
from .command import run
from .hub_folder import publish_folder

# Of `meta`: what starting from the file and a reader want to know, and mmseg's functions elsewhere.
_META = (STATED, 'cfg', 'dataset_meta', 'epoch', 'iter', 'mmengine_version')


def publish(argv: Sequence[str] | None = None) -> None:
    """Writes a checkpoint for others."""
    parser = argparse.ArgumentParser(
        description="Write a run's model as a folder that timm and the Hugging Face hub read, or a "
        'checkpoint with its weights, its config and its classes, without optimizer, schedulers '
        'and log.'
    )
    parser.add_argument('source', help='work dir of tools/train.py, or a checkpoint of it')
    parser.add_argument(
        'out',
        help='of a work dir: folder to write; of a checkpoint: NAME.pth, which is written as '
        'NAME-<8 digits of sha256>.pth',
    )
    parser.add_argument(
        '--checkpoint', metavar='FILE', help='of the work dir (default: the best, or else the last)'
    )
    parser.add_argument('--license', metavar='ID', help="the hub's name, such as apache-2.0")
    parser.add_argument('--numbers', metavar='FILE', help='JSON that tools/test.py --out wrote')
    parser.add_argument('--debug', action='store_true', help='show the full trace of an error')
    run(parser, argv, lambda args: print(f'wrote {_publish(args)}'))


def _publish(args: argparse.Namespace) -> Path:
    if not Path(args.source).exists():
        raise ValueError(
            f'source={args.source!r} does not exist: the work dir of a run, or a checkpoint of it'
        )
    if Path(args.source).is_dir():
        if args.out.endswith('.pth'):
            raise ValueError(f'out={args.out!r} is a file: name the checkpoint, or a folder')
        options = args.checkpoint, args.license, args.numbers
        return publish_folder(args.source, args.out, *options)
    for name in ('checkpoint', 'license', 'numbers'):
        if getattr(args, name) is not None:
            raise ValueError(f'--{name} is for a folder, which is made of a work dir')
    if not args.out.endswith('.pth'):
        raise ValueError(
            f'out={args.out!r} must end in .pth; a folder is made of the work dir of a run, which '
            f'{args.source!r} is not'
        )
    return publish_checkpoint(args.source, args.out)


def publish_checkpoint(checkpoint: str, out: str) -> Path:
    """Writes the weights, the config and the classes of a checkpoint."""
    target = Path(out)
    content = read_content(checkpoint)
    if not isinstance(content, dict) or not {'state_dict', 'meta'} <= content.keys():
        raise ValueError(f"checkpoint {checkpoint!r} has no 'state_dict' and 'meta' of a training")
    meta = {name: content['meta'][name] for name in _META if name in content['meta']}
    target.parent.mkdir(parents=True, exist_ok=True)
    unnamed = target.with_suffix('.part')
    try:
        try:
            torch.save({'meta': meta, 'state_dict': content['state_dict']}, unnamed)
        except RuntimeError as error:  # of torch's writer
            raise SaveError(f'{target} could not be written ({reason_of(error)})') from error
        digits = digest_of(unnamed)[:8]
        named = target.with_name(f'{target.stem}-{digits}.pth')
        os.replace(unnamed, named)
    finally:  # of a disk that is full
        unnamed.unlink(missing_ok=True)
    return named
