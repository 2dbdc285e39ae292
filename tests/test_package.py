"""The package as a whole: which part may import which, and what the base install needs."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import vqmoe_vision

PACKAGE = Path(__file__).parents[1] / 'vqmoe_vision'
TOOLS = PACKAGE.parent / 'tools'
# A part may import itself and the parts of a lower layer.
LAYERS = {
    'arguments': 0,
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


def imported_parts(source: str, package: str) -> set[str]:
    """Names of the parts of vqmoe_vision that `source`, a module inside `package`, imports."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split('.')[: len(package.split('.')) - node.level + 1]
            base = [*(parents if node.level else []), *(node.module or '').split('.')]
            names += ['.'.join([*filter(None, base), alias.name]) for alias in node.names]
    return {n.split('.')[1] for n in names if n.startswith('vqmoe_vision.')} & LAYERS.keys()


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


def test_base_import_needs_only_torch_and_timm_and_contrib_is_imported_when_asked_for() -> None:
    listing = "print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = "print('vqmoe_vision.contrib' in sys.modules)"
    program = f"""import sys, torch, timm
{listing}
import vqmoe_vision
{listing}
from vqmoe_vision.moe import METHODS
names = [*METHODS], 'mocle' in METHODS
{loaded}
METHODS['mocle']
{loaded}"""
    printed = subprocess.check_output([sys.executable, '-c', program], text=True).splitlines()
    before, after = (set(line.split()) for line in printed[:2])
    assert after - before - sys.stdlib_module_names <= {'vqmoe_vision'}
    assert printed[2:] == ['False', 'True']


def test_version_and_changelog_agree() -> None:
    changelog = (PACKAGE.parent / 'CHANGELOG.md').read_text()
    newest = re.search('^## (.*)$', changelog, re.MULTILINE)
    assert newest
    released = f'{re.escape(vqmoe_vision.__version__)} - [0-9]{{4}}-[0-9]{{2}}-[0-9]{{2}}'
    developed = vqmoe_vision.__version__.endswith('.dev0')
    assert re.fullmatch('Unreleased' if developed else released, newest[1])


def test_readme_citation_and_code_call_the_paper_alike() -> None:
    root, title = (
        PACKAGE.parent,
        'On the Role of Discrete Representation in Sparse Mixture of Experts',
    )
    for file in ('README.md', 'CITATION.cff', 'vqmoe_vision/moe/methods/vqmoe.py'):
        assert title in (root / file).read_text()
    cited = (root / 'CITATION.cff').read_text()
    assert f'\nversion: {vqmoe_vision.__version__}\n' in cited
