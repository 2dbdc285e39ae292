"""What a training is about to read: checked before it begins."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from mmengine.runner import Runner

from vqmoe_vision.moe.config import check

from .model import MoeTrainingMixin, unwrapped


class TrainingPart(NamedTuple):
    """A part of training images; a data set has it as `training_part`."""

    source: tuple[str, ...]
    name: str
    dev_size: int


def check_training_data(runner: Runner) -> None:
    """Refuses data that a training would misuse, or stop at."""
    _check_held_out(runner)
    if isinstance(model := unwrapped(runner), MoeTrainingMixin):
        model.check_batches(runner.train_dataloader)


def _check_held_out(runner: Runner) -> None:
    """Whoever trains on all images, both parts, means it: docs/data.md says what that is for."""
    if runner.cfg.get('val_dataloader') is None:
        return
    trained = list(_parts(runner.train_dataloader.dataset))
    for part in _parts(runner.val_dataloader.dataset):
        for other in trained:
            held_out = {part.name, other.name} == {'train', 'dev'} and part.source == other.source
            check(
                not held_out or part.dev_size == other.dev_size,
                'val_dataloader.dataset.dev_size',
                part.dev_size,
                f'train_dataloader.dataset has dev_size={other.dev_size} of the same images, and '
                'validation would look at images of training; give both data sets the same',
            )


def _parts(dataset: Any) -> Iterator[TrainingPart]:
    if (part := getattr(dataset, 'training_part', None)) is not None:
        yield part
    for inner in (getattr(dataset, 'dataset', None), *(getattr(dataset, 'datasets', None) or [])):
        if inner is not None:
            yield from _parts(inner)
