"""Texts of configs in checkpoints of others: kept if they hold values, and build what is known.

mmengine runs such a text, in its `resume` and in its inferencers, and builds or imports whatever
the values name.
"""

import ast
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from mmengine.utils import get_object_from_string

# Packages that a config of others may name.
_TRUSTED = ('mmcv', 'mmengine', 'mmseg', 'vqmoe_vision')


def is_harmless(text: Any) -> bool:
    """Whether a config assigns nothing but values, and names only what is known here.

    Args:
        text: As mmengine writes it into a checkpoint: Python that assigns values.
    """
    if not isinstance(text, str) or '{{' in text:
        return False  # mmengine replaces what is in braces before it runs the text
    try:
        values = _values(ast.parse(text))
        return all(_is_known(name, value) for name, value in _fields(values))
    except Exception:  # what is no such text fails in any way
        return False


def _values(module: ast.Module) -> dict[str, Any]:
    """What a text assigns.

    Raises:
        ValueError: It does anything else.
    """
    found = {}
    for statement in module.body:
        if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
            raise ValueError('more than an assignment')
        target = statement.targets[0]
        # a name that is given another meaning keeps it in the rest of the text
        name = target.id if isinstance(target, ast.Name) else ''
        if not name or name.startswith('__') or name in ('dict', '_base_'):
            raise ValueError('more than a name, or a file that would be run')
        found[name] = _value(statement.value)
    return found


def _value(node: ast.expr) -> Any:
    """A literal, in which a dictionary may be written as a call with keywords.

    Raises:
        ValueError: It is anything else.
    """
    match node:
        case ast.Call(func=ast.Name(id='dict'), args=[], keywords=keywords):
            if any(keyword.arg is None for keyword in keywords):
                raise ValueError('a dictionary of another')
            return {keyword.arg: _value(keyword.value) for keyword in keywords}
        case ast.Dict(keys=keys, values=values):
            if any(key is None for key in keys):
                raise ValueError('a dictionary of another')
            names = [ast.literal_eval(key) for key in keys if key is not None]
            return dict(zip(names, map(_value, values), strict=True))
        case ast.List(elts=elements) | ast.Tuple(elts=elements) | ast.Set(elts=elements):
            return [_value(element) for element in elements]
        case _:
            return ast.literal_eval(node)


def _fields(value: Any) -> Iterator[tuple[str, Any]]:
    """All fields of dictionaries, at any depth."""
    if isinstance(value, dict):
        yield from value.items()
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, dict | list):
            yield from _fields(inner)


def _is_known(name: str, value: Any) -> bool:
    """Whether what a field names is a class or a module of a package that is trusted."""
    if name == 'type':
        return isinstance(value, str) and _is_known_type(value)
    if name in ('_scope_', 'default_scope'):
        return value is None or value in _TRUSTED
    if name == 'custom_imports':
        imports = value.get('imports') if isinstance(value, dict) else value
        modules = [imports] if isinstance(imports, str) else imports
        return all(module.split('.')[0] in _TRUSTED for module in modules or ())
    return True


def _is_known_type(name: str) -> bool:
    """Whether building a type can do no more than make an object of a class.

    A registry imports what it does not know, and calls whatever it finds there.
    """
    package, _, rest = name.partition('.')
    if not rest:  # of a registry, or else the module of that name would be imported
        return package in sys.modules or find_spec(package) is None
    if package not in _TRUSTED:
        return False
    found = get_object_from_string(name)
    return found is None or isinstance(found, type)  # None: a scope and a name in its registry
