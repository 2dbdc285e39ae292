"""Public functions say what their arguments are: shapes, units, what is allowed."""

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm

PACKAGE = Path(__file__).parents[1] / 'vqmoe_vision'
MODULES = sorted(
    '.'.join(path.relative_to(PACKAGE.parent).with_suffix('').parts)
    for path in PACKAGE.rglob('*.py')
    if path.name != '__init__.py'
)
FACTORY = {'device', 'dtype', 'factory'}  # as everywhere in torch.nn


def undocumented(function: Callable, docstring: str, is_method: bool) -> list[str]:
    """Arguments that the section `Args:` leaves out, of a function that has several."""
    names = [
        n for n in list(inspect.signature(function).parameters)[is_method:] if n not in FACTORY
    ]
    section = re.search(r'^Args:\n(.*?)(?=^\S|\Z)', docstring, re.MULTILINE | re.DOTALL)
    named = re.findall(r'^    \*{0,2}(\w+):', section[1], re.MULTILINE) if section else []
    return sorted(set(names) - set(named)) if len(names) > 1 else []


def public_functions(module: Any) -> Iterator[tuple[str, Callable, str, bool]]:
    """Name, function, docstring and whether there is a `self` that nobody passes."""
    for name, value in vars(module).items():
        if name.startswith('_') or getattr(value, '__module__', None) != module.__name__:
            continue
        if inspect.isclass(value):
            if '__init__' in vars(value) and not hasattr(value, '__dataclass_fields__'):
                yield name, value.__init__, inspect.getdoc(value) or '', True
            for method, member in vars(value).items():
                ours = inspect.isfunction(member) and not documented_upstream(value, method, member)
                if ours and not method.startswith('_'):
                    yield f'{name}.{method}', member, inspect.getdoc(member) or '', True
        elif inspect.isfunction(value) and not documented_together(module, name):
            yield name, value, inspect.getdoc(value) or '', False


def documented_upstream(cls: type, name: str, function: Callable) -> bool:
    """Whether a method has the arguments of the one of timm or mmengine that it overrides."""
    parameters = list(inspect.signature(function).parameters)
    return any(
        list(inspect.signature(vars(base)[name]).parameters) == parameters
        for base in cls.__mro__[1:]
        if name in vars(base) and not base.__module__.startswith('vqmoe_vision')
    )


def documented_together(module: Any, name: str) -> bool:
    """Entry points, whose arguments are `timm.create_model`'s, and what `Method` documents."""
    in_method = module.__name__.startswith('vqmoe_vision.moe.methods.')
    return timm.is_model(name) or (in_method and name == 'build')


@pytest.mark.parametrize('name', MODULES)
def test_every_argument_is_documented(name: str) -> None:
    module = importlib.import_module(name)
    missing = {
        function_name: names
        for function_name, *function in public_functions(module)
        if (names := undocumented(*function))
    }
    assert missing == {}
