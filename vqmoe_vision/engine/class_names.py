"""Whether a data set calls its classes as the training of a checkpoint did."""

import logging
from collections.abc import Iterable
from itertools import zip_longest
from typing import Any

from mmengine.logging import print_log

# What the config of a run of this package imports, and that of a run of others does not.
_OURS = 'vqmoe_vision'


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
