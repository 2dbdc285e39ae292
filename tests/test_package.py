"""The package as a whole: which part may import which, and what the base install needs."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vqmoe_vision

PACKAGE = Path(__file__).parents[1] / 'vqmoe_vision'
TOOLS = PACKAGE.parent / 'tools'
# A part may import itself and the parts of a lower layer.
LAYERS = {
    'provenance': 0,
    'moe': 0,
    'models': 1,
    'engine': 2,
    'script': 2,
    'analysis': 3,
    'classification': 4,
    'segmentation': 4,
    'comparison': 4,
    'contrib': 5,  # the core does without: `METHODS` has an import path for its method
    '__main__': 5,
}


def imported_names(source: str, package: str) -> list[str]:
    """Full names of what `source`, a module inside `package`, imports."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split('.')[: len(package.split('.')) - node.level + 1]
            base = [*(parents if node.level else []), *(node.module or '').split('.')]
            names += ['.'.join([*filter(None, base), alias.name]) for alias in node.names]
    return names


def imported_parts(source: str, package: str) -> set[str]:
    """Names of the parts of vqmoe_vision that `source`, a module inside `package`, imports."""
    names = imported_names(source, package)
    return {n.split('.')[1] for n in names if n.startswith('vqmoe_vision.')} & LAYERS.keys()


@pytest.mark.parametrize(
    ('source', 'expected'),
    [
        ('import vqmoe_vision.moe.routing', {'moe'}),
        ('from vqmoe_vision import models, moe', {'models', 'moe'}),
        ('from vqmoe_vision.engine.hooks import X', {'engine'}),
        ('from .. import models', {'models'}),
        ('from ..models import x', {'models'}),
        ('from . import losses', {'moe'}),
        ('import torch', set()),
    ],
)
def test_imported_parts_sees_every_form_of_import(source: str, expected: set[str]) -> None:
    assert imported_parts(source, 'vqmoe_vision.moe') == expected


def test_imports_point_down() -> None:
    wrong = []
    for path in PACKAGE.rglob('*.py'):
        relative = path.relative_to(PACKAGE.parent)
        part = relative.parts[1].removesuffix('.py')
        if part == '__init__':
            continue
        for other in imported_parts(path.read_text(), '.'.join(relative.parent.parts)):
            if other != part and LAYERS[other] >= LAYERS[part]:
                wrong.append(f'{relative} imports {other}')
    assert not wrong


def test_contrib_is_imported_when_its_method_is_asked_for() -> None:
    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob('*.py')
        if 'vqmoe_vision.contrib' in path.read_text() and path.parent.name != 'contrib'
    }
    assert found == {'moe/methods/__init__.py'}
    loaded = "print('vqmoe_vision.contrib' in sys.modules)"
    program = (
        f'import sys, vqmoe_vision\nfrom vqmoe_vision.moe import METHODS\n{loaded}\n'
        f"names = [*METHODS], 'mocle' in METHODS\n{loaded}\nMETHODS['mocle']\n{loaded}"
    )
    printed = subprocess.check_output([sys.executable, '-c', program], text=True)
    assert printed.split() == ['False', 'False', 'True']


def test_the_package_imports_no_tool() -> None:
    tools = {'tools', *(path.stem for path in TOOLS.iterdir())}
    assert {'benchmark', 'train'} <= tools
    for path in PACKAGE.rglob('*.py'):
        package = '.'.join(path.relative_to(PACKAGE.parent).parent.parts)
        names = imported_names(path.read_text(), package)
        assert not {name.partition('.')[0] for name in names} & tools, path


def test_no_module_but_the_table_imports_a_method() -> None:
    methods = PACKAGE / 'moe' / 'methods'
    names = {path.stem for path in methods.glob('*.py')} - {'__init__'}
    pattern = re.compile(
        rf'methods\.({"|".join(names)})\b|methods import .*\b({"|".join(names)})\b'
    )
    found = [
        f'{path.relative_to(PACKAGE)}: {match[0]}'
        for path in PACKAGE.rglob('*.py')
        if path.parent != methods
        for match in pattern.finditer(path.read_text())
    ]
    assert found == []


def test_every_part_has_a_layer() -> None:
    parts = {p.stem for p in PACKAGE.iterdir() if p.suffix == '.py' or (p / '__init__.py').exists()}
    assert parts - {'__init__'} <= LAYERS.keys()


def test_base_import_needs_only_torch_and_timm() -> None:
    listing = "print(*{name.partition('.')[0] for name in sys.modules})"
    program = f'import sys, torch, timm\n{listing}\nimport vqmoe_vision\n{listing}'
    printed = subprocess.check_output([sys.executable, '-c', program], text=True)
    before, after = (set(line.split()) for line in printed.splitlines())
    added = after - before
    assert added - sys.stdlib_module_names <= {'vqmoe_vision'}


def test_version_and_changelog_agree() -> None:
    changelog = (PACKAGE.parent / 'CHANGELOG.md').read_text()
    newest = re.search('^## (.*)$', changelog, re.MULTILINE)
    assert newest
    released = f'{re.escape(vqmoe_vision.__version__)} - [0-9]{{4}}-[0-9]{{2}}-[0-9]{{2}}'
    developed = vqmoe_vision.__version__.endswith('.dev0')
    assert re.fullmatch('Unreleased' if developed else released, newest[1])
