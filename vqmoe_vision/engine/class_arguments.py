"""Which arguments the classes of others take, for configs that name those classes."""

import inspect
from collections.abc import Collection, Mapping
from typing import Any

from vqmoe_vision.moe.config import check, did_you_mean


def arguments_of(kind: type) -> dict[str, inspect.Parameter]:
    """What a class can be built with, also what it hands on to the next class by `**kwargs`."""
    found: dict[str, inspect.Parameter] = {}
    for base in kind.__mro__:
        if '__init__' not in base.__dict__:
            continue
        parameters = inspect.signature(base.__dict__['__init__']).parameters.values()
        others = [p for p in parameters if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        for parameter in parameters:
            if parameter not in others and parameter.name != 'self':
                found.setdefault(parameter.name, parameter)
        if not any(p.kind is p.VAR_KEYWORD for p in others):
            break
    return found


def check_arguments(owner: str, given: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuses arguments that a class does not have, which it would ignore or fail on later."""
    for name, value in given.items():
        allowed = f'the options are {", ".join(sorted(known))}{did_you_mean(name, known)}'
        check(name in known, f'{owner}.{name}', value, allowed)
