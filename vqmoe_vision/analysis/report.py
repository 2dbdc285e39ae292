"""One page that shows what the experts of a model do, and opens without a network.

Needs matplotlib and jinja2 (extra `analyze`).
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from vqmoe_vision.engine.checkpoint_files import write_atomically
from vqmoe_vision.moe.config import check

from . import figures, verdicts
from .figures import History
from .measures import kept_beyond_chance
from .overview import overview
from .pictures import Picture, percent
from .shifts import Change
from .survey import Survey

# In the order of the page: anchor, heading, and what draws a model's pictures.
PICTURES = (
    ('codes', 'Codes among tokens', figures.code_maps),
    ('classes', 'Experts and classes', figures.class_maps),
    ('similarity', 'Similarity of the experts', figures.similarity_maps),
)


class Table(NamedTuple):
    """A table of the page; a row is a name and cells."""

    caption: str
    corner: str
    heads: list[str]
    rows: list[tuple[str, list[str]]]


# Anchor and heading of a section, below it pictures by model, and tables.
Section = tuple[str, str, dict[str, list[Picture]], Sequence[Table]]


def write_report(
    surveys: Sequence[Survey],
    out: Path,
    history: Mapping[str, History] | None = None,
    changes: Sequence[Change] = (),
    convergence: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Writes `report.html`, which holds all it shows, and `numbers.json`."""
    titles = [survey.title for survey in surveys]
    check(len(set(titles)) == len(titles), 'surveys', titles, 'of titles that differ')
    found: list[Section] = [
        (anchor, title, {s.title: draw(s) for s in surveys}, ()) for anchor, title, draw in PICTURES
    ]
    curves = {name: figures.training_curves(h) for name, h in (history or {}).items()}
    found += [
        ('training', 'Over training', curves, ()),
        ('numbers', 'Numbers', {}, number_tables(surveys)),
        ('shifts', 'When the picture changes', {}, shift_tables(surveys)),
        ('changes', 'Changes between checkpoints', {}, change_tables(changes, surveys)),
    ]
    of_one_run: Sequence[Survey] = ()
    if convergence:  # the checkpoints of one run come first
        of_one_run = surveys[: len(next(iter(convergence.values()))['distance'])]
        title = 'On the way to the last checkpoint'
        curves = {title: figures.convergence_curves(convergence)}
        rows = {
            survey.title: {part: of['distance'][at] for part, of in convergence.items()}
            for at, survey in enumerate(of_one_run)
        }
        table = _table('Share of the way that is left to the last', 'checkpoint', rows)
        found.append(('convergence', title, curves, [table]))
    sections = [
        (anchor, title, shown, tables)
        for anchor, title, columns, tables in found
        if (shown := {n: pictures for n, pictures in columns.items() if pictures}) or tables
    ]
    environment = Environment(
        loader=PackageLoader('vqmoe_vision.analysis'),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template('report.html').render(
        models=[*map(overview, surveys)], sections=sections, draws=verdicts.DRAWS
    )
    numbers = {
        'surveys': [survey.content() for survey in surveys],
        'history': {name: list(lines) for name, lines in (history or {}).items()},
        'changes': [vars(change) for change in changes],
        'convergence': convergence
        and {'checkpoints': [s.title for s in of_one_run], 'parts': convergence},
    }
    out.mkdir(parents=True, exist_ok=True)
    files = {out / 'report.html': page, out / 'numbers.json': json.dumps(numbers, indent=1)}
    for file, text in files.items():
        write_atomically(file, text.encode())
    return [*files]


def _table(
    caption: str, corner: str, rows: Mapping[str, Mapping[str, float]], form: str = ''
) -> Table:
    """Numbers by row and column, as shares where no form is given; what is missing is blank."""
    heads = list(dict.fromkeys(head for row in rows.values() for head in row))
    lines = []
    for name, row in rows.items():
        texts = {head: f'{v:{form}}' if form else percent(v) for head, v in row.items()}
        lines.append((name, [texts.get(head, '') for head in heads]))
    return Table(caption, corner, heads, lines)


def number_tables(surveys: Sequence[Survey]) -> list[Table]:
    """A table per layer: its numbers, a column for each model."""
    layers: dict[str, Any] = defaultdict(lambda: defaultdict(dict))
    for survey in surveys:
        for layer, seen in survey.layers.items():
            for name, value in seen.numbers.items():
                layers[layer][name][survey.title] = round(value, 9) + 0.0  # no -0, no 4e-16
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
    table = _table(caption, corner, {'by chance': chance, **rows} if chance else rows)
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
    return {
        f'{name}.{decider}': of['changed_by_chance']
        for name, layer in survey.layers.items()
        for decider, of in verdicts.by_decider(layer.numbers).items()
        if 'changed_by_chance' in of
    }
