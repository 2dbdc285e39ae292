"""Trainings of models that read images by a frozen network: its weights, and what is fitted."""

from typing import Any

from mmengine.config import ConfigDict
from mmengine.dist import broadcast
from mmengine.logging import print_log
from mmengine.runner import Runner
from torch import Tensor, nn

from vqmoe_vision.models.feature_network import fit_reader
from vqmoe_vision.models.fitting import load_features
from vqmoe_vision.models.normalization import Normalization
from vqmoe_vision.models.weights import network_of
from vqmoe_vision.moe.config import check
from vqmoe_vision.moe.image_reader import image_reader

from .checkpoint import read_state
from .model import unwrapped
from .normalization import in_words, read_normalization

# Images that a reader is fitted to, drawn from the training set with a fixed seed.
MOST_IMAGES = 16384
_BATCH_SIZE = 64
# What a data set is prepared by: of classification, and of mmseg.
_PREPARATIONS = ('transform', 'pipeline')


def start_features(
    model: nn.Module, features: str | None, started: bool, weights: Normalization | None
) -> Normalization | None:
    """Gives what reads images in a model its weights, for a new training."""
    reader = image_reader(model)
    if reader is None:
        allowed = 'None, the model decides by no features of images'
        check(features is None, 'features', features, allowed)
        return weights
    reader.lacks_weights = features is None and not started
    if features is None:
        return weights
    state = read_state(features)
    report = load_features(model, state, features, network=network_of(features))
    for line in report.lines():
        print_log(f'{features}: features: {line}', logger='current')
    found = read_normalization(features)
    if weights is not None and found is not None and weights.differing(found):
        allowed = f'weights for images with {in_words(weights)}; its are for {in_words(found)}'
        check(False, 'features', features, allowed)
    return weights or found


def fit_features(runner: Runner) -> None:
    """Fits what reads images in the model of a run to its training set, unless it is fitted."""
    model = unwrapped(runner)
    reader = image_reader(model.routed_model)
    if reader is None or bool(reader.fitted):
        return
    # not before: a run that resumes needs none, and whether it does is known only now
    allowed = (
        'the checkpoint of a dense model of the same shape, trained on the same training set, '
        'by whose features images are clustered; or start from one by checkpoint'
    )
    check(not reader.lacks_weights, 'features', None, allowed)
    images = model.source(_unaugmented(runner.cfg)).drawn(MOST_IMAGES)
    found_in = images.batches(_BATCH_SIZE)
    batches = (batch if isinstance(batch, Tensor) else batch[0] for batch in found_in)
    found = fit_reader(model, batches)
    # of the first process: others may round otherwise
    for buffer in reader.buffers():
        broadcast(buffer)
    print_log(f'images are read by {found}', logger='current')


def _unaugmented(config: Any) -> ConfigDict:
    """The training set, prepared as the images of validation or test."""
    dataset = config.train_dataloader.dataset
    for name in ('val_dataloader', 'test_dataloader'):
        held_out = (config.get(name) or {}).get('dataset') or {}
        for field in _PREPARATIONS:
            if field in held_out and field in dataset:
                return ConfigDict({**dataset, field: held_out[field]})
    allowed = (
        f'one with a {" or ".join(_PREPARATIONS)}, as val_dataloader.dataset has: images are '
        'clustered before training without augmentation'
    )
    check(False, 'train_dataloader.dataset', dict(dataset), allowed)
    raise AssertionError
