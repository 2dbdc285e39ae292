"""Whether a data set calls its classes as the training of a checkpoint did."""

from collections.abc import Iterable
from itertools import zip_longest
from typing import Any

from mmengine.config import Config
from mmengine.runner import Runner

from vqmoe_vision.models.stated_experts import stated_in
from vqmoe_vision.moe.config import check

from .config_names import innermost

# Whether label 0 of the files is nothing that is learned, and label 1 the first class.
_REDUCED = 'reduce_zero_label'


def check_class_names(content: Any, classes: Iterable[Any], where: str) -> None:
    """Compares names of classes, by which a label is a class, with those of a checkpoint."""
    trained = stated_in(content).get('classes')
    if not isinstance(trained, list | tuple):
        return
    for index, (before, now) in enumerate(zip_longest(map(str, trained), map(str, classes))):
        if before != now:
            raise ValueError(
                f'the checkpoint was trained with other classes: its class {index} is {before!r}, '
                f'that of {where} is {now!r}; give the classes the names of the training, in its '
                'order'
            )


def check_zero_label(runner: Runner, split: str, trained: Any, whose: str) -> None:
    """Compares from which label on data sets of one kind count their classes."""
    field = f'{split}_dataloader'
    now = getattr(runner, field).dataset.metainfo.get(_REDUCED)
    before = (trained or {}).get(_REDUCED)
    if now is None or before is None or now == before:
        return
    kinds = _kinds(runner.cfg, 'train_dataloader')
    allowed = f'{before}, as in {whose}, or every class would be that of another label'
    same = not kinds or (len(kinds) == 1 and kinds == _kinds(runner.cfg, field))
    check(not same, f'{field}.dataset.{_REDUCED}', now, allowed)


def _kinds(config: Config, loader: str) -> set[tuple[str, str]]:
    dataset = (config.get(loader) or {}).get('dataset')
    found = innermost(dataset) if isinstance(dataset, dict) else ()
    return {(str(inner.get('type')), str(inner.get('data_root'))) for inner in found}
