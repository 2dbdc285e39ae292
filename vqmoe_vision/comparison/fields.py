"""The fields of a comparison's file, as far as each can be judged alone."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from typing import Any

from mmengine.config import Config

from vqmoe_vision.moe.config import check

_NEEDED = {'config', 'seeds', 'metric'}
_FLAGS = {'all_methods', 'all_presets', 'all_started'}
_LISTS = {'also', 'controls', 'highlighted', 'options', 'seeds'}
_TEXTS = {'config', 'metric', 'reference', 'stage'}
_BY_NAME = {'images', 'rows', 'shifts'}


def read_fields(path: str) -> dict[str, Any]:
    """What a file assigns, by name."""
    try:
        return Config.fromfile(path, import_custom_modules=False).to_dict()
    except SyntaxError as error:
        raise ValueError(f'{path}, line {error.lineno}: {error.msg}') from error


def check_fields(path: str, given: dict[str, Any], known: Iterable[str]) -> None:
    """Refuses fields of a comparison that are missing, not known, or of another type."""
    missing = _NEEDED - given.keys()
    if wrong := sorted((given.keys() - {*known}) | missing):
        raise ValueError(f'{path}: fields {wrong} are missing or not known; known: {sorted(known)}')
    for name in sorted(_TEXTS & given.keys()):
        check(isinstance(given[name], str), f'{path}: {name}', given[name], 'a text')
    for listed in sorted(_LISTS & given.keys()):
        value = given[listed]
        several = isinstance(value, Sequence) and not isinstance(value, str)
        check(several, f'{path}: {listed}', value, 'a list')
        if listed != 'seeds':
            for each in value:
                check(isinstance(each, str), f'{path}: {listed}', each, 'a list of texts')
    for flag in sorted(_FLAGS & given.keys()):
        check(isinstance(given[flag], bool), f'{path}: {flag}', given[flag], 'True or False')
    for named in sorted(_BY_NAME & given.keys()):
        value = given[named]
        allowed = f"texts by name, {named} = dict(NAME='TEXT')"
        valid = isinstance(value, dict) and all(isinstance(name, str) for name in value)
        check(valid, f'{path}: {named}', value, allowed)
        for name, text in value.items():
            where = f'{path}: {named}.{name}'
            check(isinstance(text, str), where, text, 'write it in one string')


def words_of(field: str, line: str) -> list[str]:
    """What a shell makes of a line of options."""
    try:
        return shlex.split(line)
    except ValueError as error:
        raise ValueError(f'{field}={line!r} is not possible: {error}') from error
