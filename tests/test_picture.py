"""The picture of the architecture names what exists, and is drawn from its text."""

import html
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / 'vqmoe_vision'
TEXT = (ROOT / 'docs' / 'architecture.dot').read_text()
LABELS = [label.split(r'\n') for label in re.findall(r'label="([^"]+)"', TEXT)]
FILES = [
    (lines[at - 1], line)
    for lines in LABELS
    for at, line in enumerate(lines)
    if line.endswith('.py')
]


@pytest.mark.parametrize(('name', 'file'), FILES)
def test_what_is_named_above_a_file_is_defined_in_it(name: str, file: str) -> None:
    module = importlib.import_module('vqmoe_vision.' + file.removesuffix('.py').replace('/', '.'))
    assert getattr(module, name).__module__ == module.__name__


def test_packages_exist() -> None:
    folders = {line for lines in LABELS for line in lines if line.endswith('/')}
    assert {'moe/', 'models/', 'engine/'} <= folders
    assert [folder for folder in folders if not (PACKAGE / folder).is_dir()] == []


def test_picture_is_drawn_from_its_text() -> None:
    svg = (ROOT / 'docs' / 'images' / 'architecture.svg').read_text()
    drawn = [html.unescape(text) for text in re.findall(r'<text [^>]*>([^<]*)</text>', svg)]
    expected = [line for lines in LABELS for line in lines]
    assert sorted(drawn) == sorted(expected), 'run make picture'
