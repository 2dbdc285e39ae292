"""The documentation's build: the pages of docs/, and the docstrings of the public API.

`make docs` runs it strictly: a link that leads nowhere and a page that index.md does not name fail.
"""

import re
import sys
from inspect import isclass
from pathlib import Path

from sphinx.application import Sphinx

import vqmoe_vision

project = 'vqmoe_vision'
author = 'the vqmoe_vision authors'
release = vqmoe_vision.__version__

extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon', 'sphinx.ext.viewcode']
exclude_patterns = ['_build', 'results', 'archive']  # what a tool writes, and what no page lists
html_theme = 'furo'
html_title = f'vqmoe_vision {release}'
html_copy_source = False

myst_heading_anchors = 4  # GitHub's anchors, so that one link serves both
default_role = 'code'  # docstrings mark code as Markdown does, with single backticks
autodoc_member_order = 'bysource'
autodoc_typehints = 'description'
autodoc_typehints_description_target = 'documented'
autodoc_default_options = {'members': True, 'show-inheritance': True}
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # fields of a dataclass stand in its docstring only

DOCS = Path(__file__).parent
sys.path.append(str(DOCS))
ENTRY = re.compile(r'^- \[[^\]]+\]\(([\w/-]+)\.md\)', re.MULTILINE)
RELATIVE_LINK = re.compile(r'\]\((?!https?:|#)([^)#\s]+)(#[^)\s]+)?')


def add_contents(app: Sphinx, page: str, source: list[str]) -> None:
    """index.md is a plain list, as GitHub shows it; here it is the table of contents too."""
    if page == 'index':
        entries = '\n'.join(ENTRY.findall(source[0]))
        source[0] += f'\n```{{toctree}}\n:hidden:\n\n{entries}\n```\n'


def add_signatures(app: Sphinx, page: str, source: list[str]) -> None:
    """The names of the API, as GitHub shows them; here their docstrings follow."""
    if page == 'reference/api':
        from generate import public

        kinds = {name: 'class' if isclass(each) else 'function' for name, each in public().items()}
        details = '\n'.join(f'.. auto{kind}:: {name}' for name, kind in kinds.items())
        source[0] += f'\n```{{eval-rst}}\n{details}\n```\n'


def link_repository_files(app: Sphinx, page: str, source: list[str]) -> None:
    """A link to code, the README or the archive opens a copy of that file."""

    def file_link(match: re.Match) -> str:
        target = (DOCS / page).parent.joinpath(match[1]).resolve()
        inside = target.is_relative_to(DOCS) and target.suffix in ('.md', '.png', '.svg')
        built = inside and target.relative_to(DOCS).parts[0] not in exclude_patterns
        return match[0] if built else f'](path:{match[1]}'

    source[0] = RELATIVE_LINK.sub(file_link, source[0])


def setup(app: Sphinx) -> None:
    app.connect('source-read', add_contents)
    app.connect('source-read', add_signatures)
    app.connect('source-read', link_repository_files)
