"""One page that shows what the experts of a model do, and opens without a network.

Needs matplotlib and jinja2 (extra `analyze`).
"""

import base64
import io
import json
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from . import figures
from .checkpoints import Change, Convergence
from .drawing import Picture, percent
from .figures import History
from .measures import kept_beyond_chance
from .surveyed import Survey

DPI = 110
MOST_LETTERS = 100  # of a name; file systems end at 255
BY_CHANCE = 'by chance'
# By the last part of a number's name; docs/routing-measures.md has definitions and sources.
MEANINGS = {
    'load_entropy': '1 if all experts take as many tokens, 0 if one takes all',
    'load_variation': 'standard deviation of the load over its mean, 0 if it is even',
    'dead_experts': 'experts that received nothing from any image',
    'unrouted': 'share of tokens without any expert',
    'changed_by_chance': 'share of tokens that would change if experts were drawn from the load',
    'mixed_tokens': 'how many tokens a slot mixes; if all evenly, their mean',
    'mixed_slots': 'of how many slots a token mixes the answers',
    'mutual_information': 'what the expert says about the class, in nats, 0 if nothing',
    'normalized_mutual_information': 'the same, from 0 to 1: one of them tells the other',
    'code_perplexity': 'how many codes are in use, weighted by how often',
    'dead_codes': 'codes that no token took',
    'quantization_error': "squared distance of tokens to their codes, over the tokens' energy",
    'quantization_error_around_mean': 'the same over the variance of tokens; below 1 codes help',
    'similarity_weights': "mean cosine of two experts' parameters, 1 if all are the same",
    'similarity_outputs': "mean cosine of two experts' answers to the same tokens",
    'effective_rank_before': 'directions that the tokens of the layer spread over, 1 if collapsed',
    'effective_rank_after': "the same of the layer's answers",
    'gate_continuous': 'mean share of the continuous branch, the router; the rest is the codebook',
}
# how to read the sections
PATCHES = """
Every patch has the colour of its expert, or of its code. Gates and slots are bright where they have
much weight."""
LOAD = """
An even row shares the work. A cell is brightest from four times an even load on; a row with one
such cell and dark others has collapsed, unless most tokens are of one kind."""
SUREST = """
What an expert takes with the largest weights, these first; of a codebook what lies nearest to the
code."""
CODES = 'A token goes to its nearest code. Near on a plane may be far in the other directions.'
CLASSES = """
Each row is a class and sums to 100. Where all are alike experts do not follow classes."""
SIMILARITY = """
Of their parameters as they lie, and of their answers to the same tokens. Experts that are all alike
do the work of one."""
TRAINING = """
The load of a layer with a router and a codebook is that of both together. A router or codebook that
has come to rest before the experts has converged faster."""
NUMBERS = 'One table per layer; docs/routing-measures.md defines them and names their sources.'
SHIFTS = """
The same tokens with the picture corrupted, cropped or mirrored. It says something only if much less
changes than by chance: one expert that takes everything never changes."""
CHANGES = """
The same tokens, seen by two checkpoints of a run: a router that is still undecided late in training
sends them elsewhere."""
CONVERGENCE = """
Theorem 4.1 of the paper says that routers settle long before the experts. A learning rate that goes
to zero brings all to rest together: the early part of lines counts."""
# In the order of the page: anchor, heading, how to read it, and what draws a model's pictures.
PICTURES = (
    ('patches', 'Where the patches go', PATCHES, figures.patch_maps),
    ('load', 'Load of the experts', LOAD, figures.load_maps),
    ('surest', 'The surest patches of each expert', SUREST, figures.surest_patches),
    ('codes', 'Codes among tokens', CODES, figures.code_maps),
    ('classes', 'Experts and classes', CLASSES, figures.class_maps),
    ('similarity', 'Similarity of the experts', SIMILARITY, figures.similarity_maps),
)


class Shown(NamedTuple):
    """A picture as the page and a file hold it."""

    file: str
    title: str
    alt: str
    png: bytes

    @property
    def uri(self) -> str:
        """The picture as the address of an image."""
        return 'data:image/png;base64,' + base64.b64encode(self.png).decode()


class Table(NamedTuple):
    """A table of the page; a row is a name, what it means, and cells."""

    caption: str
    corner: str
    heads: list[str]
    rows: list[tuple[str, str, list[str]]]


class Section(NamedTuple):
    """A heading of the page, and below it pictures by model, and tables."""

    id: str
    title: str
    text: str
    columns: dict[str, list[Shown]]
    tables: Sequence[Table] = ()


def write_report(
    surveys: Sequence[Survey],
    out: Path,
    history: Mapping[str, History] | None = None,
    changes: Sequence[Change] = (),
    convergence: Convergence | None = None,
) -> list[Path]:
    """Writes `report.html`, which holds all it shows, its pictures as files, and `numbers.json`."""
    titles = [survey.title for survey in surveys]
    if len(set(titles)) < len(titles):
        raise ValueError(f'surveys: titles have to differ, these are {", ".join(titles)}')
    sections = _sections(surveys, history or {}, changes, convergence)
    pictures = out / 'pictures'
    pictures.mkdir(parents=True, exist_ok=True)
    for old in pictures.glob('*.png'):
        old.unlink()
    written = [out / 'report.html', out / 'numbers.json']
    environment = Environment(
        loader=PackageLoader('vqmoe_vision.analysis'),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template('report.html').render(surveys=surveys, sections=sections)
    written[0].write_text(page)
    numbers = {
        'surveys': [survey.numbers() for survey in surveys],
        'history': {name: list(lines) for name, lines in (history or {}).items()},
        'changes': [vars(change) for change in changes],
        'convergence': vars(convergence) if convergence is not None else None,
    }
    written[1].write_text(json.dumps(numbers, indent=1))
    for picture in (p for s in sections for column in s.columns.values() for p in column):
        written.append(pictures / picture.file)
        written[-1].write_bytes(picture.png)
    return written


def _sections(
    surveys: Sequence[Survey],
    history: Mapping[str, History],
    changes: Sequence[Change],
    convergence: Convergence | None,
) -> list[Section]:
    """All sections that have something to show, in the order of the page."""
    found = [
        Section(anchor, title, text, {s.title: _shown(draw(s), s.title) for s in surveys})
        for anchor, title, text, draw in PICTURES
    ]
    curves = {name: _shown(figures.training_curves(h), name) for name, h in history.items()}
    shifts, changed = shift_tables(surveys), change_tables(changes, surveys)
    found += [
        Section('training', 'Over training', TRAINING, curves),
        Section('numbers', 'Numbers', NUMBERS, {}, number_tables(surveys)),
        Section('shifts', 'When the picture changes', SHIFTS, {}, shifts),
        Section('changes', 'Changes between checkpoints', CHANGES, {}, changed),
    ]
    if convergence is not None:
        title = 'On the way to the last checkpoint'
        curves = {title: _shown(figures.convergence_curves(convergence), 'checkpoints')}
        tables = [convergence_table(convergence)]
        found.append(Section('convergence', title, CONVERGENCE, curves, tables))
    for section in found:
        for title in [title for title, pictures in section.columns.items() if not pictures]:
            del section.columns[title]
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
        picture.figure.savefig(data, format='png', dpi=DPI, metadata={'Software': None})
        file = f'{name}-{picture.name}.png'
        found.append(Shown(file, picture.title, picture.alt, data.getvalue()))
    return found


def _table(
    caption: str, corner: str, rows: Mapping[str, Mapping[str, float]], form: str = ''
) -> Table:
    """Numbers by row and column, as shares where no form is given; what is missing is blank."""
    heads = list(dict.fromkeys(head for row in rows.values() for head in row))
    lines = []
    for name, row in rows.items():
        texts = {head: f'{v:{form}}' if form else percent(v) for head, v in row.items()}
        cells = [texts.get(head, '') for head in heads]
        lines.append((name, MEANINGS.get(name.rpartition('/')[2], ''), cells))
    return Table(caption, corner, heads, lines)


def number_tables(surveys: Sequence[Survey]) -> list[Table]:
    """A table per layer: its numbers, a column for each model."""
    layers: dict[str, dict[str, dict[str, float]]] = {}
    for survey in surveys:
        for layer, seen in survey.layers.items():
            for name, value in seen.numbers.items():
                layers.setdefault(layer, {}).setdefault(name, {})[survey.title] = value
    return [_table(layer, 'number', rows, '.4g') for layer, rows in layers.items()]


def shift_tables(surveys: Sequence[Survey]) -> list[Table]:
    """By model, shift and decider: share of tokens whose expert changes, and what is kept."""
    tables = []
    for survey in surveys:
        if any(survey.shifts.values()):  # SoftMoE has no expert that could change
            tables += _changes(f'{survey.title}: ', 'shift', survey.shifts, _by_chance(survey))
    return tables


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
    if not any(kept.values()):
        return [table]
    caption = f'{of}kept beyond chance: 1 is all, 0 as if drawn anew'
    return [table, _table(caption, corner, kept, '.2f')]


def _by_chance(survey: Survey) -> dict[str, float]:
    end = '/changed_by_chance'
    return {
        f'{name}.{number.removesuffix(end)}': value
        for name, layer in survey.layers.items()
        for number, value in layer.numbers.items()
        if number.endswith(end)
    }


def convergence_table(convergence: Convergence) -> Table:
    """What is left of the way to the last checkpoint, by checkpoint and part."""
    rows = {
        title: {part: found['distance'][at] for part, found in convergence.parts.items()}
        for at, title in enumerate(convergence.checkpoints)
    }
    return _table('Share of the way that is left to the last', 'checkpoint', rows)
