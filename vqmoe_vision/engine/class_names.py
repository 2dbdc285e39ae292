"""Whether a data set calls its classes as the training of a checkpoint did."""

import logging
from collections.abc import Iterable
from itertools import zip_longest
from typing import Any

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.runner import Runner

from vqmoe_vision.moe.config import check

from .wrapped_data import innermost

# What the config of a run of this package imports, and that of a run of others does not.
_OURS = 'vqmoe_vision'
# Whether label 0 of the files is nothing that is learned, and label 1 the first class.
_REDUCED = 'reduce_zero_label'


def check_class_names(meta: Any, classes: Iterable[Any], where: str) -> None:
    """Compares names of classes, by which a label is a class, with those of a checkpoint.

    Others may spell the classes of one data set otherwise: of their checkpoints, names that differ
    are a warning.

    Args:
        meta: `meta` of the checkpoint; without the names of its classes nothing is compared.
        classes: Names of the data set by index.
        where: The data set, for messages.

    Raises:
        ValueError: The checkpoint is of a run of this package, which called a class otherwise.
    """
    meta = meta if isinstance(meta, dict) else {}
    trained = (meta.get('dataset_meta') or {}).get('classes') or ()
    pairs = enumerate(zip_longest(map(str, trained), map(str, classes)))
    differing = [(index, before, now) for index, (before, now) in pairs if before != now]
    if not trained or not differing:
        return
    index, before, now = differing[0]
    message = (
        f'the checkpoint was trained with other classes: its class {index} is {before!r}, that of '
        f'{where} is {now!r}'
    )
    if _OURS in str(meta.get('cfg', '')):
        raise ValueError(f'{message}; give the classes the names of the training, in its order')
    print_log(f'{message}; are they spelled otherwise?', 'current', logging.WARNING)


def check_zero_label(runner: Runner, split: str, trained: Any, whose: str) -> None:
    """Compares from which label on data sets of one kind count their classes.

    Every class would be another, and no name of a class says so. A data set of another kind than
    that of the training, or in another folder, may have its label maps written otherwise.

    Args:
        runner: About to run, with the data set of the split.
        split: 'train' of a run that goes on, 'val' or 'test'.
        trained: `metainfo` of the training's data set; None if that is not known.
        whose: Where that is from, for messages.

    Raises:
        ValueError: The data set counts otherwise.
    """
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
