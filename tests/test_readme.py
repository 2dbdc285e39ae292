"""The pages keep their promises: Python blocks run as printed, links lead somewhere.

A block that starts with ```python is run. One that needs what only the reader has, such as a
checkpoint, starts with ```py and is not.
"""

import ast
import html
import importlib
import operator
import re
from pathlib import Path

import pytest

from vqmoe_vision.moe import METHODS

ROOT = Path(__file__).parents[1]
README = ROOT / 'README.md'
_BUILT = {'_build', 'api', 'archive'}  # copies of these pages, by sphinx, and what no page lists
PAGES = (
    README,
    *(p for p in sorted((ROOT / 'docs').glob('**/*.md')) if not _BUILT.intersection(p.parts)),
)
FENCE = re.compile(r'^```python\n(.*?)^```$', re.MULTILINE | re.DOTALL)
LINK = re.compile(r'\]\((?!https?://|#)([^)#\s]+)')

# [`module.name`](../path.py), or [`Name`](../path.py)
NAME = re.compile(r'\[`([\w.]+)`\]\(\.\./\.\./(vqmoe_vision/[\w/]+)\.py\)')


def python_blocks() -> list:
    blocks = []
    for page in PAGES:
        text = page.read_text()
        for match in FENCE.finditer(text):
            lines_before = text.count('\n', 0, match.start(1))
            # Padded, so that a traceback names the line of the page.
            padded = '\n' * lines_before + match[1]
            blocks.append(pytest.param(page, padded, id=f'{page.name} line {lines_before + 1}'))
    return blocks


@pytest.mark.parametrize(('page', 'block'), python_blocks())
def test_python_block_runs(
    page: Path, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # what a block writes must not land in the repository
    exec(compile(block, str(page), 'exec'), {'__name__': '__main__'})


def test_readme_shows_python() -> None:
    assert any(README in case.values for case in python_blocks())


def test_links_lead_to_files() -> None:
    assert [link for link in LINK.findall(README.read_text()) if not (ROOT / link).exists()] == []


@pytest.mark.parametrize('method', METHODS)
def test_every_method_has_its_row_and_its_section(method: str) -> None:
    assert f'| `vit_*_{method}` |' in (ROOT / 'docs' / 'reference' / 'models.md').read_text()
    section = rf'^## .* - `(methods|contrib)/{method}\.py`$'
    assert re.search(section, (ROOT / 'docs/explanation/methods.md').read_text(), re.M)
    assert f', `vit_*_{method}` |' in (ROOT / 'docs/explanation/which-method.md').read_text()


def test_methods_page_links_names_to_the_files_that_define_them() -> None:
    found = NAME.findall((ROOT / 'docs/explanation/methods.md').read_text())
    names = [(name, path) for name, path in found if not name.endswith('.py')]
    assert len(names) > 5
    for name, path in names:
        module = importlib.import_module(path.replace('/', '.'))
        operator.attrgetter(name.removeprefix(f'{path.rpartition("/")[2]}.'))(module)


@pytest.mark.parametrize('method', METHODS)
def test_options_that_start_as_the_dense_model_are_in_the_table(method: str) -> None:
    rows = re.findall(
        rf'^\| `{method}` \| ([^|]*) \|', (ROOT / 'docs/how-to/weights-in.md').read_text(), re.M
    )
    cases = METHODS[method].config.EXACT_UPCYCLING.values()
    written = [', '.join(f'`{name}={value!r}`' for name, value in case.items()) for case in cases]
    assert rows == ([case or 'none are needed' for case in written] or ['there are none'])


# --- names in the picture of the architecture, and on the page of places

TEXT = (ROOT / 'docs/images/architecture.dot').read_text()
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


def test_picture_is_drawn_from_its_text() -> None:
    svg = (ROOT / 'docs' / 'images' / 'architecture.svg').read_text()
    drawn = [html.unescape(text) for text in re.findall(r'<text [^>]*>([^<]*)</text>', svg)]
    expected = [line for lines in LABELS for line in lines]
    assert sorted(drawn) == sorted(expected), 'run make picture'


PLACES = re.findall(
    r'`([\w/]+\.py)::([\w.]+)`', (ROOT / 'docs/explanation/architecture.md').read_text()
)


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
