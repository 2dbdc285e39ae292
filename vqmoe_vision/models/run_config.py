"""The text of a config that a run has left in its checkpoint, which is read and never run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any


def assigned(content: Any) -> dict[str, ast.expr]:
    """What the config in a checkpoint assigns, by name.

    Args:
        content: Of a checkpoint of ours, of mmseg or of others; empty without a config.
    """
    meta = content.get('meta') if isinstance(content, dict) else None
    text = meta.get('cfg', '') if isinstance(meta, dict) else ''
    try:
        statements = ast.parse(str(text)).body
    except Exception:  # what is no Python makes the parser fail in any way
        return {}
    found = [s for s in statements if isinstance(s, ast.Assign)]
    return {ast.unparse(s.targets[0]): s.value for s in found}


def fields_of(node: ast.AST | None) -> Iterator[tuple[str, ast.expr]]:
    """Names and values of a dictionary, in either of Python's two ways to write one.

    Args:
        node: Of a config; anything else has no fields.
    """
    if isinstance(node, ast.Call):
        yield from ((keyword.arg, keyword.value) for keyword in node.keywords if keyword.arg)
    elif isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant):
                yield str(key.value), value


def values_of(node: ast.AST | None) -> dict[str, Any]:
    """As `fields_of`, of those fields that are plain values.

    Args:
        node: As `fields_of`.
    """
    found = {}
    for name, value in fields_of(node):
        try:
            found[name] = ast.literal_eval(value)
        # a call, such as another dictionary, or what somebody else has written
        except (ValueError, TypeError, RecursionError):
            continue
    return found
