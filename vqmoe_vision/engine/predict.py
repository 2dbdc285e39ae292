"""What `tools/predict.py` does: images without labels through a trained model of either task."""

import argparse
import sys
from collections.abc import Sequence

from mmengine.registry import MODELS
from mmengine.utils import track_iter_progress

from vqmoe_vision.arguments import parser_of
from vqmoe_vision.moe.config import check

from .cli import load_config, run
from .images import list_images
from .model import scope_of


def predict(argv: Sequence[str] | None = None) -> None:
    """Predicts images, and writes what the task of the model makes of them."""
    run(parser_of('predict'), argv, _predict)


def _predict(args: argparse.Namespace) -> None:
    files = [file for images in args.images for file in list_images(images)]
    config = load_config(args.config, args.cfg_options)
    for name in ('model', 'test_dataloader'):
        check(config.get(name) is not None, f'{args.config}: {name}', None, 'a config')
    with scope_of(config):
        kind = MODELS.get(config.model.type)
    allowed = 'Classifier or MoeEncoderDecoder'
    check(hasattr(kind, 'predictions'), 'model.type', config.model.type, allowed)
    predictions = kind.predictions(args, files)  # as `MoeTrainingMixin`
    for file in track_iter_progress(files, file=sys.stdout):
        predictions.add(file)
    print(f'\n{predictions.end()}')
