"""A package, or processes that tests spawn would import the `tests` that soft-moe installs."""

from typing import Any

import pytest


def cases(names: str, *rows: Any, ids: Any = None) -> pytest.MarkDecorator:
    """`pytest.mark.parametrize`, with a row for each argument."""
    return pytest.mark.parametrize(names, rows, ids=ids)
