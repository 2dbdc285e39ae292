"""What `tools/predict.py` does."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import mmcv
from mmengine.utils import track_iter_progress

from vqmoe_vision.engine.cli import CHECKPOINT_HELP, CONFIG_HELP
from vqmoe_vision.engine.command import run
from vqmoe_vision.engine.config import add_config_options
from vqmoe_vision.moe.config import check

from .inference import Predictor, list_images


def predict(argv: Sequence[str] | None = None) -> None:
    """Segments an image or a folder of images."""
    parser = argparse.ArgumentParser(description='Segment images.')
    parser.add_argument('config', help=CONFIG_HELP)
    parser.add_argument('checkpoint', help=CHECKPOINT_HELP)
    parser.add_argument('images', nargs='+', help='image files, or folders of images')
    parser.add_argument(
        '--out-dir',
        type=Path,
        default=Path('work_dirs/predictions'),
        help='gets overlays/<name>.png and labels/<name>.png (class indices)',
    )
    parser.add_argument('--device', help='where to run (default: a GPU if there is one)')
    parser.add_argument('--opacity', type=float, default=0.5, help='of the colours, 0 to 1')
    add_config_options(parser)
    parser.add_argument('--debug', action='store_true', help='show the full trace of an error')
    run(parser, argv, _predict)


def _predict(args: argparse.Namespace) -> None:
    check(0 <= args.opacity <= 1, '--opacity', args.opacity, 'from 0 to 1')
    files = [Path(file) for images in args.images for file in list_images(images)]
    seen: dict[str, Path] = {}
    for file in files:
        same = seen.setdefault(file.stem, file)
        check(same is file, 'images', str(file), f'one without the output of {same}')
    predictor = Predictor(args.config, args.checkpoint, args.device, args.cfg_options)
    for file in track_iter_progress(files, file=sys.stdout):
        result = predictor(file, opacity=args.opacity)
        mmcv.imwrite(result.overlay, str(args.out_dir / 'overlays' / f'{result.name}.png'))
        mmcv.imwrite(result.labels, str(args.out_dir / 'labels' / f'{result.name}.png'))
    print(f'\nwrote {args.out_dir}/overlays and {args.out_dir}/labels')
