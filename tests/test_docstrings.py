"""What is exported, registered or an option says what its arguments are."""

import importlib
import inspect
import re
from collections.abc import Callable
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


def arguments(value: Any) -> list[str]:
    """Those that a caller passes, of a function or of what builds a class."""
    if is_dataclass(value):  # what it inherits stands in the base, others in a comment beside them
        own, source = inspect.get_annotations(value), inspect.getsource(value)
        names = [field.name for field in fields(value) if field.name in own]
        beside = r'(#.*\n    {0}: |^    {0}: .*#)'
        return [name for name in names if not re.search(beside.format(name), source, re.M)]
    if inspect.isclass(value) and '__init__' not in vars(value):
        return []
    return list(inspect.signature(value).parameters)


@pytest.mark.parametrize('name', sorted(exported()))
def test_every_argument_of_what_is_exported_is_documented(name: str) -> None:
    value = exported()[name]
    names = [each for each in arguments(value) if each not in FACTORY]
    text = inspect.cleandoc(value.__doc__ or '')
    section = re.search(r'^Args:\n(.*?)(?=^\S|\Z)', text, re.MULTILINE | re.DOTALL)
    told = re.findall(r'^    \*{0,2}(\w+):', section[1], re.MULTILINE) if section else []
    assert len(names) < 2 or set(names) <= set(told)
