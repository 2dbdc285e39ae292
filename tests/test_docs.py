"""The pages keep their promises: Python runs as printed, links lead somewhere, prose is plain.

A block that starts with ```python is run. One that needs what only the reader has, such as a
checkpoint, starts with ```py and is not.
"""

import html
import importlib
import operator
import os
import re
import runpy
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from vqmoe_vision.moe import METHODS

from . import cases

ROOT = Path(__file__).parents[1]
README = ROOT / 'README.md'
_LEFT_OUT = {'_build', 'archive', 'results'}  # built, in no navigation, written by a tool
_FOUND = sorted((ROOT / 'docs').glob('**/*.md'))
PAGES = [README, *(p for p in _FOUND if not _LEFT_OUT.intersection(p.parts))]
PROSE = [page for page in PAGES if '<!-- written by' not in page.read_text()]
FENCE = re.compile(r'^```python\n(.*?)^```$', re.MULTILINE | re.DOTALL)
CODE = re.compile(r'^ *```.*?^ *```$|<!--.*?-->', re.MULTILINE | re.DOTALL)
LINK = re.compile(r'\]\((?!https?://)([^)#\s]*)(?:#([^)\s]+))?\)')

# what pages say in other words
WORDS = {
    'significant, or equal within a margin': r'(can(not)?|could not) be told|stands? (the|a) corr',
    'minus': r'\bless (its|the|a|dense|frozen|SMoE|VQMoE)\b',
    'is +0.1, or improves by 0.1': r'\b(has|have|had|with) [+-]\d',
    'validation': r'\bheld[- ]out\b',
    'dense-1x or dense-2x': r'matched dense|dense_wide|dense of its own width',
    'by position': r'(?<!\()hash routing',
    'CPU model': r'make of (the )?processor',
    'not significant': r'is (not )?seen to',
}
# a number, its sign and its digits; not a part of a name, such as CIFAR-10, or of an interval
NUMBER = re.compile(r'(?<![\w.-])[+-]?\d[\d.,]*(?![\w-])')
INTERVAL = re.compile(r'\([+-]?[\d.]+ to [+-]?[\d.]+[^)]*\)')


def read(page: str) -> str:
    return (ROOT / 'docs' / page).read_text()


def lines_of(page: Path) -> list[str]:
    """Lines of a page, empty where they are of code or of a comment."""
    text = page.read_text()
    return CODE.sub(lambda code: '\n' * code[0].count('\n'), text).split('\n')


def sentences(page: Path) -> Iterator[str]:
    """Of paragraphs and lists: tables and headings are none."""
    lines = [line.removeprefix('>') for line in lines_of(page)]
    prose = [re.sub(r'^ *([-*] |\d+\. |(\||#|!\[).*)', r'\n', line) for line in lines]
    text = re.sub(r'`[^`]+`', 'code', re.sub('<[^>]*>', '', '\n'.join(prose)))
    text = re.sub(r'!?\[([^]]*)\]\([^)]*\)', r'\1', text).replace('*', '')
    for paragraph in re.split(r'\n\s*\n', text):
        yield from re.split(r'(?<=[.!?])\s+(?=[A-Z\d(c"])', ' '.join(paragraph.split()))


def anchors(page: Path) -> list[str]:
    """Of headings, as GitHub makes them."""
    titles = [re.sub(r'[`*]', '', line) for line in lines_of(page) if re.match('#+ ', line)]
    return [re.sub(r'[^\w -]', '', each.lstrip('# ').lower()).replace(' ', '-') for each in titles]


@pytest.mark.parametrize('page', PROSE, ids=lambda page: page.stem)
def test_prose_is_plain(page):
    found, lines = list(sentences(page)), lines_of(page)
    assert not [each for each in found if len(re.findall(r'\S*\w\S*', each)) > 25]
    assert not [each for each in found if len(NUMBER.findall(INTERVAL.sub('', each))) > 2]
    text = ' '.join(lines)
    assert not [(f[0], word) for word, p in WORDS.items() for f in re.finditer(p, text)]
    assert not [line for line in lines if len(line) > 100 and line.lstrip()[0] not in '|![']
    assert [line for line in lines if line.startswith('# ')] == lines[:1]
    assert len({*anchors(page)}) == len(anchors(page))


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for file, anchor in LINK.findall('\n'.join(lines_of(page))):
        target = page.parent / file if file else page
        assert target.is_file(), file  # Sphinx copies no folder
        assert not anchor or anchor in anchors(target), (file, anchor)


# Arguments of torchrun, as pages write them.
COMMANDS = sorted(
    {
        command
        for page in [*PAGES, ROOT / 'vqmoe_vision/arguments.py']
        for command in re.findall(r'torchrun (-.*? --launcher pytorch)', page.read_text())
    }
)


@pytest.mark.parametrize('script', ['train C', 'test C P', *COMMANDS])
def test_torchrun_leaves_options_to_the_tool(script, tmp_path):
    words = script.split()
    if len(words) < 4:  # of a script that calls torchrun
        (tmp_path / 'torchrun').write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        (tmp_path / 'torchrun').chmod(0o755)
        path = {**os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}'}
        call = [ROOT / f'tools/dist_{words[0]}.sh', *words[1:], '8']
        words = subprocess.check_output(call, text=True, env=path).split()
    args = get_args_parser().parse_args([*words, '--log', 'plain'])
    assert args.training_script_args[-2:] == ['--log', 'plain']


@pytest.mark.pages
def test_pages_that_are_made_from_code_are_current():
    for path, text in runpy.run_path(str(ROOT / 'docs/generate.py'))['pages']():
        assert path.read_text() == text, 'run make reference'


def test_the_key_answers_thirty_questions():  # their headings are links like others
    row = r'^\|(\d+)\|.*\]\(\S+#\S+\)( part)?\|$'
    rows = re.findall(row, read('reference/questions.md'), re.MULTILINE)
    assert [int(number) for number, _ in rows] == [*range(1, 31)]
    assert [part for _, part in rows].count('') >= 27


def python_blocks() -> Iterator:
    for page in PAGES:
        for match in FENCE.finditer(text := page.read_text()):
            before = '\n' * text.count('\n', 0, match.start(1))  # a traceback names the line
            yield pytest.param(page, before + match[1], id=f'{page.name} line {len(before) + 1}')


@cases('page, block', *python_blocks())
def test_python_block_runs(page, block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what a block writes must not land in the repository
    exec(compile(block, str(page), 'exec'), {'__name__': '__main__'})


@pytest.mark.parametrize('method', METHODS)
def test_every_method_has_its_section_and_its_rows(method):
    section = rf'^## .* - `(methods|contrib)/{method}\.py`$'
    assert re.search(section, read('explanation/methods.md'), re.M)
    assert f', `vit_*_{method}`|' in read('explanation/which-method.md')
    # options that start as the dense model
    rows = re.findall(rf'^\|`{method}`\|([^|]*)\|', read('how-to/weights-in.md'), re.M)
    cases = METHODS[method].config.EXACT_UPCYCLING.values()
    written = [', '.join(f'`{name}={value!r}`' for name, value in case.items()) for case in cases]
    assert rows == ([case or 'none are needed' for case in written] or ['there are none'])


# --- what pages and the picture of the architecture name, and in which file

LABELS = re.findall(r'label="([^"]+)"', read('images/architecture.dot'))
DRAWN = [line for label in LABELS for line in label.split(r'\n')]
# [`module.name`](../path.py), or [`Name`](../path.py)
LINKED = r'\[`([\w.]+)`\]\(\.\./\.\./vqmoe_vision/([\w/]+\.py)\)'
ARCHITECTURE = read('explanation/architecture.md')
PLACES = [
    *((above, file) for above, file in pairwise(DRAWN) if file.endswith('.py')),
    *(link for link in re.findall(LINKED, read('explanation/methods.md')) if '.py' not in link[0]),
    *((n, f) for f, n in re.findall(r'`([\w/]+\.py)::([\w.]+)`', ARCHITECTURE)),
]


@cases('name, file', *sorted({*PLACES}))
def test_what_is_named_is_defined_in_its_file(name, file):
    place = file.removesuffix('.py').removesuffix('/__init__').replace('/', '.')
    module = importlib.import_module(f'vqmoe_vision.{place}')
    found = operator.attrgetter(name.removeprefix(f'{Path(file).stem}.'))(module)
    assert len(PLACES) > 30 and getattr(found, '__module__', module.__name__) == module.__name__


def test_picture_is_drawn_from_its_text():
    svg = read('images/architecture.svg')
    drawn = [html.unescape(text) for text in re.findall(r'<text [^>]*>([^<]*)</text>', svg)]
    assert sorted(drawn) == sorted(DRAWN), 'run make picture'
