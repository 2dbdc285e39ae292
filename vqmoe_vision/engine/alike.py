"""Whether all processes of a run have the same config and the same data sets."""

import re
from collections.abc import Iterator, Mapping
from hashlib import sha256
from typing import Any

from mmengine.config import Config
from mmengine.dist import all_gather_object
from mmengine.runner import Runner

from .processes import Processes

_SHOWN = 40  # characters of a value in a message
_ADDRESS = re.compile(r' at 0x[0-9a-f]+')  # of a function in a config, in each process another one


def check_configs(processes: Processes, config: Config) -> None:
    """Compares the configs of all processes."""
    _compare(processes, 'configs', dict(_leaves(config.to_dict())))


def check_datasets(processes: Processes, runner: Runner, splits: tuple[str, ...]) -> None:
    """Compares the data sets of all processes."""
    fields = {}
    for name in (f'{split}_dataloader' for split in splits):
        if runner.cfg.get(name) is not None:
            dataset = getattr(runner, name).dataset
            classes = getattr(dataset, 'metainfo', {}).get('classes', ())
            fields[f'len({name}.dataset)'] = str(len(dataset))
            fields[f'{name}.dataset.metainfo.classes'] = ', '.join(map(str, classes))
    _compare(processes, 'data sets', fields)


def _leaves(value: Any, name: str = '') -> Iterator[tuple[str, str]]:
    """What a config holds, by dotted name."""
    if isinstance(value, dict | list | tuple) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inside in items:
            yield from _leaves(inside, f'{name}.{key}' if name else str(key))
    elif isinstance(value, set | frozenset):  # in each process in another order
        yield name, f'{{{", ".join(sorted(_ADDRESS.sub("", repr(one)) for one in value))}}}'
    else:
        yield name, _ADDRESS.sub('', repr(value))


def _compare(processes: Processes, what: str, fields: Mapping[str, str]) -> None:
    if processes.size == 1:
        return
    digest = sha256(repr(sorted(fields.items())).encode()).hexdigest()
    if len(set(all_gather_object(digest))) == 1:
        return
    of_ranks = all_gather_object(dict(fields))
    names = {name: None for one in of_ranks for name in one}
    differ = [n for n in names if len({one.get(n) for one in of_ranks}) > 1]
    message = f'the ranks have different {what}: {differ[0]} is {_by_value(differ[0], of_ranks)}'
    if len(differ) > 1:
        message += f'; other fields that differ: {len(differ) - 1}'
    processes.refuse(message)


def _by_value(name: str, of_ranks: list[dict[str, str]]) -> str:
    """Which value is on which ranks; a long one is shown from where it differs."""
    ranks: dict[str, list[str]] = {}
    for rank, fields in enumerate(of_ranks):
        ranks.setdefault(fields.get(name, 'missing'), []).append(str(rank))
    common = next((i for i, c in enumerate(zip(*ranks, strict=False)) if len(set(c)) > 1), 0)
    start = max(common - _SHOWN // 2, 0) if max(map(len, ranks)) > _SHOWN else 0
    return ' and '.join(
        f'{"..." * (start > 0)}{value[start : start + _SHOWN]} on rank{"s" * (len(of) > 1)} '
        + ', '.join(of)
        for value, of in ranks.items()
    )
