"""The documentation's build: every page of docs/ and an API reference from the docstrings.

`make docs` runs it strictly: a link that leads nowhere and a page that index.md does not name fail.
"""

import re
from pathlib import Path

from sphinx.application import Sphinx

import vqmoe_vision

project = 'vqmoe_vision'
author = 'the vqmoe_vision authors'
release = vqmoe_vision.__version__

extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon', 'sphinx.ext.viewcode']
exclude_patterns = ['_build', 'results', 'archive']  # rows and tables that a tool writes, and what no page lists
html_theme = 'furo'
html_title = f'vqmoe_vision {release}'
html_copy_source = False

myst_heading_anchors = 4  # GitHub's anchors, so that one link serves both
default_role = 'code'  # docstrings mark code as Markdown does, with single backticks
autodoc_member_order = 'bysource'
autodoc_typehints = 'description'
autodoc_typehints_description_target = 'documented'
# What a package re-exports is documented once, in its own module: see `link_public_names`.
autodoc_default_options = {'members': True, 'show-inheritance': True, 'ignore-module-all': True}
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # fields of a dataclass stand in its docstring only

DOCS = Path(__file__).parent
ENTRY = re.compile(r'^- \[[^\]]+\]\(([\w/-]+)\.md\)', re.MULTILINE)
PARENT_LINK = re.compile(r'\]\((\.\./[^)#\s]+)(#[^)\s]+)?')


def add_contents(app: Sphinx, page: str, source: list[str]) -> None:
    """index.md is a plain list, as GitHub shows it; here it is the table of contents too."""
    if page == 'index':
        entries = '\n'.join([*ENTRY.findall(source[0]), 'api/modules'])
        source[0] += f'\n```{{toctree}}\n:hidden:\n\n{entries}\n```\n'


def link_repository_files(app: Sphinx, page: str, source: list[str]) -> None:
    """A link that leaves docs/, to code or the README, opens a copy of that file."""

    def file_link(match: re.Match) -> str:
        target = (DOCS / page).parent.joinpath(match[1]).resolve()
        return match[0] if target.is_relative_to(DOCS) else f'](path:{match[1]}'

    source[0] = PARENT_LINK.sub(file_link, source[0])


def keep_equations(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list):
    """Indented blocks of a module's docstring are equations and code, to be shown as they stand."""
    if what == 'module':
        for at in reversed(range(1, len(lines))):
            if lines[at].startswith('    ') and not lines[at - 1]:
                lines[at:at] = ['::', '']


def link_public_names(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list):
    """A package's page names what users import from it."""
    public = [getattr(obj, n) for n in getattr(obj, '__all__', ())] if what == 'module' else []
    links = [f':py:obj:`~{o.__module__}.{o.__qualname__}`' for o in public if callable(o)]
    if links:
        lines += ['', 'Import from here: ' + ', '.join(links) + '.']


def setup(app: Sphinx) -> None:
    app.connect('source-read', add_contents)
    app.connect('source-read', link_repository_files)
    app.connect('autodoc-process-docstring', keep_equations)
    app.connect('autodoc-process-docstring', link_public_names)
