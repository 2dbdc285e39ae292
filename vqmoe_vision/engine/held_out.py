"""What validation looks at is left out of training: that both data sets part their images alike."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from mmengine.runner import Runner

from vqmoe_vision.moe.config import check


class TrainingPart(NamedTuple):
    """A part of training images; a data set has it as `training_part`.

    Attributes:
        source: The images that are parted, equal for the parts of the same.
        name: 'train', 'dev', or what holds both.
        dev_size: Number of images that 'train' leaves to 'dev'.
    """

    source: tuple[str, ...]
    name: str
    dev_size: int


def check_held_out(runner: Runner) -> None:
    """Refuses a validation on images of training, where training was told to leave some out.

    Whoever trains on all images, both parts, means it: docs/data.md says what that is for.

    Args:
        runner: About to train.

    Raises:
        ValueError: One data set has the part 'train', the other the part 'dev' of the same images
            with another `dev_size`.
    """
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
    """Of a data set, and of all inside a wrapper of mmengine."""
    if (part := getattr(dataset, 'training_part', None)) is not None:
        yield part
    for inner in (getattr(dataset, 'dataset', None), *(getattr(dataset, 'datasets', None) or [])):
        if inner is not None:
            yield from _parts(inner)
