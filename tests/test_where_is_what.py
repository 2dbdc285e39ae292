"""The page that says where a reader finds what names things that are there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLACES = re.findall(r'`([\w/]+\.py)::([\w.]+)`', (ROOT / 'docs/where-is-what.md').read_text())


@pytest.mark.parametrize(('file', 'name'), PLACES)
def test_what_the_page_names_is_there(file: str, name: str) -> None:
    body = ast.parse((ROOT / 'vqmoe_vision' / file).read_text()).body
    for part in name.split('.'):
        found = [
            node
            for node in body
            if getattr(node, 'name', None) == part
            or (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == part)
        ]
        assert found, part
        body = getattr(found[0], 'body', [])


def test_the_page_has_the_twenty_answers() -> None:
    assert len(PLACES) >= 20
