"""One page that shows what the experts of a model do, and opens without a network.

Needs matplotlib and jinja2 (extra `analyze`).
"""

import base64
import io
import json
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from vqmoe_vision.moe.config import check

from . import figures
from .checkpoints import Change
from .drawing import Picture, percent
from .figures import History
from .measures import kept_beyond_chance
from .surveyed import Survey

MOST_LETTERS = 100  # of a name; file systems end at 255
BY_CHANCE = 'by chance'
# In the order of the page: anchor, heading, and what draws a model's pictures.
PICTURES = (
    ('patches', 'Where the patches go', figures.patch_maps),
    ('load', 'Load of the experts', figures.load_maps),
    ('surest', 'The surest patches of each expert', figures.surest_patches),
    ('codes', 'Codes among tokens', figures.code_maps),
    ('classes', 'Experts and classes', figures.class_maps),
    ('similarity', 'Similarity of the experts', figures.similarity_maps),
)


# A picture as the page and a file hold it: file, title, alt, png, and uri, its address in the page.
Shown = dict[str, Any]


class Table(NamedTuple):
    """A table of the page; a row is a name and cells."""

    caption: str
    corner: str
    heads: list[str]
    rows: list[tuple[str, list[str]]]


class Section(NamedTuple):
    """A heading of the page, and below it pictures by model, and tables."""

    id: str
    title: str
    columns: dict[str, list[Shown]]
    tables: Sequence[Table] = ()


def write_report(
    surveys: Sequence[Survey],
    out: Path,
    history: Mapping[str, History] | None = None,
    changes: Sequence[Change] = (),
    convergence: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Writes `report.html`, which holds all it shows, its pictures as files, and `numbers.json`."""
    titles = [survey.title for survey in surveys]
    check(len(set(titles)) == len(titles), 'surveys', titles, 'of titles that differ')
    sections = _sections(surveys, history or {}, changes, convergence)
    pictures = out / 'pictures'
    pictures.mkdir(parents=True, exist_ok=True)
    for old in pictures.glob('*.png'):
        old.unlink()
    environment = Environment(
        loader=PackageLoader('vqmoe_vision.analysis'),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template('report.html').render(surveys=surveys, sections=sections)
    numbers = {
        'surveys': [survey.numbers() for survey in surveys],
        'history': {name: list(lines) for name, lines in (history or {}).items()},
        'changes': [vars(change) for change in changes],
        'convergence': convergence
        and {
            'checkpoints': titles[: _checkpoints(convergence)],
            'parts': convergence,
        },
    }
    shown = [p for s in sections for column in s.columns.values() for p in column]
    files = {
        out / 'report.html': page.encode(),
        out / 'numbers.json': json.dumps(numbers, indent=1).encode(),
        **{pictures / picture['file']: picture['png'] for picture in shown},
    }
    for path, content in files.items():
        path.write_bytes(content)
    return [*files]


def _checkpoints(convergence: Mapping[str, Any]) -> int:
    return len(next(iter(convergence.values()))['distance'])


def _sections(
    surveys: Sequence[Survey],
    history: Mapping[str, History],
    changes: Sequence[Change],
    convergence: Mapping[str, Any] | None,
) -> list[Section]:
    """All sections that have something to show, in the order of the page."""
    found = [
        Section(anchor, title, {s.title: _shown(draw(s), s.title) for s in surveys})
        for anchor, title, draw in PICTURES
    ]
    curves = {name: _shown(figures.training_curves(h), name) for name, h in history.items()}
    shifts, changed = shift_tables(surveys), change_tables(changes, surveys)
    found += [
        Section('training', 'Over training', curves),
        Section('numbers', 'Numbers', {}, number_tables(surveys)),
        Section('shifts', 'When the picture changes', {}, shifts),
        Section('changes', 'Changes between checkpoints', {}, changed),
    ]
    if convergence:
        title = 'On the way to the last checkpoint'
        curves = {title: _shown(figures.convergence_curves(convergence), 'checkpoints')}
        rows = {
            survey.title: {part: found['distance'][at] for part, found in convergence.items()}
            for at, survey in enumerate(surveys[: _checkpoints(convergence)])
        }
        table = _table('Share of the way that is left to the last', 'checkpoint', rows)
        found.append(Section('convergence', title, curves, [table]))
    found = [
        s._replace(columns={n: shown for n, shown in s.columns.items() if shown}) for s in found
    ]
    return [section for section in found if section.columns or section.tables]


def _shown(pictures: Iterable[Picture], title: str) -> list[Shown]:
    """Pictures drawn; the title of their model begins the names of their files."""
    words = title.replace('/', '--')
    name = re.sub(r'[^\w.-]+', '_', words)[-MOST_LETTERS:]
    if name != words:  # long or odd titles are told apart by a checksum
        name = f'{name}-{zlib.crc32(title.encode()):08x}'
    found = []
    for picture in pictures:
        data = io.BytesIO()
        # without the version of matplotlib: the same survey gives the same file
        picture.figure.savefig(data, format='png', dpi=110, metadata={'Software': None})
        png = data.getvalue()
        uri = f'data:image/png;base64,{base64.b64encode(png).decode()}'
        names = {'file': f'{name}-{picture.name}.png', 'title': picture.title, 'alt': picture.alt}
        found.append({**names, 'png': png, 'uri': uri})
    return found


def _table(
    caption: str, corner: str, rows: Mapping[str, Mapping[str, float]], form: str = ''
) -> Table:
    """Numbers by row and column, as shares where no form is given; what is missing is blank."""
    heads = list(dict.fromkeys(head for row in rows.values() for head in row))
    texts = {
        name: {head: f'{v:{form}}' if form else percent(v) for head, v in row.items()}
        for name, row in rows.items()
    }
    lines = [(name, [text.get(head, '') for head in heads]) for name, text in texts.items()]
    return Table(caption, corner, heads, lines)


def number_tables(surveys: Sequence[Survey]) -> list[Table]:
    """A table per layer: its numbers, a column for each model."""
    layers: dict[str, Any] = defaultdict(lambda: defaultdict(dict))
    for survey in surveys:
        for layer, seen in survey.layers.items():
            for name, value in seen.numbers.items():
                layers[layer][name][survey.title] = value
    return [_table(layer, 'number', rows, '.4g') for layer, rows in layers.items()]


def shift_tables(surveys: Sequence[Survey]) -> list[Table]:
    """By model, shift and decider: share of tokens whose expert changes, and what is kept."""
    return [
        table
        for survey in surveys
        if any(survey.shifts.values())  # SoftMoE has no expert that could change
        for table in _changes(f'{survey.title}: ', 'shift', survey.shifts, _by_chance(survey))
    ]


def change_tables(changes: Sequence[Change], surveys: Sequence[Survey]) -> list[Table]:
    """Share of tokens whose expert changes from one checkpoint to another, and what is kept."""
    rows = {f'{change.before} to {change.after}': change.shares for change in changes}
    if not any(rows.values()):
        return []
    chance = next((_by_chance(s) for s in surveys if s.title == changes[-1].after), {})
    return _changes('', 'checkpoints', rows, chance)


def _changes(
    of: str, corner: str, rows: dict[str, dict[str, float]], chance: dict[str, float]
) -> list[Table]:
    caption = f'{of}share of tokens whose first expert changes'
    table = _table(caption, corner, {BY_CHANCE: chance, **rows} if chance else rows)
    kept = {
        name: {
            decider: kept_beyond_chance(share, chance[decider])
            for decider, share in shares.items()
            if chance.get(decider, 0) > 0
        }
        for name, shares in rows.items()
    }
    caption = f'{of}kept beyond chance: 1 is all, 0 as if drawn anew'
    return [table, *([_table(caption, corner, kept, '.2f')] if any(kept.values()) else [])]


def _by_chance(survey: Survey) -> dict[str, float]:
    end = '/changed_by_chance'
    return {
        f'{name}.{number.removesuffix(end)}': value
        for name, layer in survey.layers.items()
        for number, value in layer.numbers.items()
        if number.endswith(end)
    }
