"""What is exported, registered or an option says what its arguments are."""

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
from mmengine import registry

from vqmoe_vision.moe import MoeConfig, MoeLayer

PACKAGE = Path(__file__).parents[1] / 'vqmoe_vision'
MODULES = sorted(
    '.'.join(path.relative_to(PACKAGE.parent).with_suffix('').parts).removesuffix('.__init__')
    for path in PACKAGE.rglob('*.py')
    if path.name != '__main__.py'
)
FACTORY = {'device', 'dtype', 'factory'}  # as everywhere in torch.nn


def exported() -> dict[str, Callable]:
    """Functions and classes of ours by their full name."""
    modules = [importlib.import_module(name) for name in MODULES]
    found = [getattr(module, name) for module in modules for name in getattr(module, '__all__', ())]
    registries = [each for each in vars(registry).values() if isinstance(each, registry.Registry)]
    for each in registries:
        children = [each, *each.children.values()]
        found += [value for child in children for value in child.module_dict.values()]
    for module in modules:
        classes = [value for value in vars(module).values() if inspect.isclass(value)]
        found += [value for value in classes if issubclass(value, (MoeConfig, MoeLayer))]
    return {
        f'{value.__module__}.{value.__qualname__}': value
        for value in found
        if inspect.isclass(value) or inspect.isfunction(value)
        if value.__module__.startswith('vqmoe_vision') and not timm.is_model(value.__name__)
    }


def documented(value: Any) -> Iterator[tuple[str, list[str], str]]:
    """Name, arguments that a caller passes, and docstring: of a function, or of a class by part."""
    if inspect.isfunction(value):
        yield value.__name__, list(inspect.signature(value).parameters), value.__doc__ or ''
        return
    if is_dataclass(value):  # what it inherits stands in the base
        own = inspect.get_annotations(value)
        names = [field.name for field in fields(value) if field.name in own]
        names = [name for name in names if not described_beside(value, name)]
        yield value.__name__, names, value.__doc__ or ''
    elif '__init__' in vars(value):
        yield value.__name__, list(inspect.signature(value).parameters), value.__doc__ or ''
    for name, member in vars(value).items():
        if inspect.isfunction(member) and not name.startswith('_'):
            names = own_parameters(value, member)
            yield f'{value.__name__}.{name}', names, member.__doc__ or ''


def own_parameters(cls: type, function: Callable) -> list[str]:
    """Arguments of a method that no method of timm or mmengine has, which it overrides."""
    theirs = [vars(base).get(function.__name__) for base in cls.__mro__[1:]]
    theirs = [other for other in theirs if other and not ours(other)]
    kept = list(inspect.signature(function).parameters.values())[1:]  # without `self`
    if theirs:
        known = {name for other in theirs for name in inspect.signature(other).parameters}
        passed_on = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        kept = [each for each in kept if each.kind not in passed_on and each.name not in known]
    return [each.name for each in kept]


def ours(value: Any) -> bool:
    return value.__module__.startswith('vqmoe_vision')


def described_beside(cls: type, name: str) -> bool:
    """Whether a comment stands at a field's line, or above it."""
    return (
        re.search(rf'(#.*\n    {name}: |^    {name}: .*#)', inspect.getsource(cls), re.M)
        is not None
    )


def left_out(names: list[str], docstring: str) -> list[str]:
    """Arguments that the section `Args:` leaves out, where there are several."""
    names = [name for name in names if name not in FACTORY]
    text = inspect.cleandoc(docstring)
    section = re.search(r'^Args:\n(.*?)(?=^\S|\Z)', text, re.MULTILINE | re.DOTALL)
    named = re.findall(r'^    \*{0,2}(\w+):', section[1], re.MULTILINE) if section else []
    return sorted(set(names) - set(named)) if len(names) > 1 else []


@pytest.mark.parametrize('name', sorted(exported()))
def test_every_argument_of_what_is_exported_is_documented(name: str) -> None:
    missing = {
        part: arguments
        for part, names, docstring in documented(exported()[name])
        if (arguments := left_out(names, docstring))
    }
    assert missing == {}
