"""One page that shows what the experts of a model do, and opens without a network.

Needs matplotlib and jinja2 (extra `analyze`).
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from .drawing import Picture, Shown, shown
from .heat_maps import class_map, load_map, similarity_map
from .patch_pictures import code_map, contact_sheet, frames, gate_map, slot_map
from .report_tables import (
    Change,
    Convergence,
    Table,
    change_tables,
    convergence_table,
    number_tables,
    shift_tables,
)
from .routing_curves import History, convergence_picture, curve_pictures
from .sentences import expert_sentence, layer_sentence
from .surveyed import Survey


@dataclass(frozen=True)
class Experts:
    """Sentences on the experts of a layer."""

    title: str
    summary: str
    sentences: list[str]


@dataclass(frozen=True)
class Column:
    """What a section shows of one model."""

    title: str
    pictures: list[Shown] = field(default_factory=list)
    experts: list[Experts] = field(default_factory=list)


@dataclass(frozen=True)
class Section:
    """A heading of the page and what stands below it."""

    id: str
    title: str
    text: str
    columns: list[Column] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    stepped: bool = False  # a slider shows one picture after the other


def _seen(survey: Survey, kind: str) -> list[str]:
    maps = getattr(survey.examples[0], kind) if survey.examples else {}
    return [name for name in survey.layers if name in maps]


# In the order of the page: anchor, heading, how to read it, and what draws a model's pictures.
PICTURES: tuple[tuple[str, str, str, Callable[[Survey], Iterable[Picture | None]]], ...] = (
    (
        'patches',
        'Where the patches go',
        'Every patch has the colour of its expert, or of its code. The slider goes through the '
        'layers from the first to the last.',
        frames,
    ),
    (
        'load',
        'Load of the experts',
        'An even row shares the work. A cell is brightest from four times an even load on; a row '
        'with one such cell and dark others has collapsed, unless most tokens are of one kind.',
        lambda survey: [load_map(survey)],
    ),
    (
        'surest',
        'The surest patches of each expert',
        'What an expert takes with the largest weights says what it looks for, if it looks for '
        'anything that can be seen. Of a codebook it is what lies nearest to the code; the numbers '
        'are the weights of its branch.',
        lambda survey: (
            contact_sheet(name, decider, layer)
            for name, layer in survey.layers.items()
            for decider in layer.confident
            if any(layer.confident[decider])
        ),
    ),
    (
        'codes',
        'Codes among tokens',
        'A token goes to its nearest code. Codes that lie among the tokens are used; on a plane, '
        'near may be far in the other directions.',
        lambda survey: (
            code_map(name, layer.codebook, layer.num_experts)
            for name, layer in survey.layers.items()
            if layer.codebook is not None
        ),
    ),
    (
        'gates',
        'Continuous or discrete branch',
        'At 1 only the continuous branch, the router, counts; at 0 only the discrete one, the '
        'codebook.',
        lambda survey: (gate_map(name, survey.examples) for name in _seen(survey, 'gates')),
    ),
    (
        'slots',
        'What slots look at',
        'A slot mixes all patches of a picture; bright ones have much weight in it.',
        lambda survey: (slot_map(name, survey.examples) for name in _seen(survey, 'slots')),
    ),
    (
        'classes',
        'Experts and classes',
        'Each row is a class and sums to 100. Rows that are all alike say that experts do not '
        'follow classes.',
        lambda survey: (
            class_map(name, decider, counts, layer.load[decider], survey.classes)
            for name, layer in survey.layers.items()
            for decider, counts in layer.expert_by_class.items()
            if survey.classes is not None
        ),
    ),
    (
        'similarity',
        'Similarity of the experts',
        'Of weights: their parameters as they lie. Of outputs: their answers to the same tokens. '
        'Experts that are all alike do the work of one.',
        lambda survey: (similarity_map(name, layer) for name, layer in survey.layers.items()),
    ),
)


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
    sections = sections_of(surveys, history or {}, changes, convergence)
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
    for picture in (p for s in sections for column in s.columns for p in column.pictures):
        written.append(pictures / picture.file)
        written[-1].write_bytes(picture.png)
    return written


def sections_of(
    surveys: Sequence[Survey],
    history: Mapping[str, History],
    changes: Sequence[Change],
    convergence: Convergence | None,
) -> list[Section]:
    """All sections that have something to show, in the order of the page."""
    return [
        *_experts(surveys),
        *_pictures(surveys),
        *_training(history),
        *_tables(surveys, changes),
        *_convergence(convergence),
    ]


def _experts(surveys: Sequence[Survey]) -> list[Section]:
    columns = [
        Column(
            survey.title,
            experts=[
                Experts(
                    name,
                    layer_sentence(layer),
                    [
                        expert_sentence(layer, expert, survey.classes)
                        for expert in range(layer.num_experts)
                    ],
                )
                for name, layer in survey.layers.items()
            ],
        )
        for survey in surveys
        if survey.layers
    ]
    text = (
        'Each sentence is made from the numbers of this page. A class is over-represented if it '
        "is at least a quarter more frequent among the expert's tokens than among all tokens; "
        '2.00 times its share is twice as frequent.'
    )
    return [Section('experts', 'Which expert does what', text, columns)]


def _pictures(surveys: Sequence[Survey]) -> list[Section]:
    sections = []
    for anchor, title, text, draw in PICTURES:
        columns = [Column(s.title, shown(draw(s), s.title)) for s in surveys]
        columns = [column for column in columns if column.pictures]
        if columns:
            stepped = draw is frames
            sections.append(Section(anchor, title, text, columns, stepped=stepped))
    return sections


def _training(history: Mapping[str, History]) -> list[Section]:
    columns = [Column(name, shown(curve_pictures(h), name)) for name, h in history.items()]
    columns = [column for column in columns if column.pictures]
    text = (
        'Recorded while the model trained. The load of a layer with a router and a codebook is '
        'that of both together. Movement says how fast a part still changes: a router or codebook '
        'that has come to rest before the experts has converged faster.'
    )
    return [Section('training', 'Over training', text, columns)] if columns else []


def _tables(surveys: Sequence[Survey], changes: Sequence[Change]) -> list[Section]:
    found = (
        (
            'numbers',
            'Numbers',
            'One table per layer; docs/routing-measures.md defines them and names their sources.',
            number_tables(surveys),
        ),
        (
            'shifts',
            'When the picture changes',
            'The same tokens with the picture corrupted, cropped or mirrored. A share of 0 % means '
            'that the routing does not notice; it says something only if much less changes than '
            'would by chance, for one expert that takes everything never changes.',
            shift_tables(surveys),
        ),
        (
            'changes',
            'Changes between checkpoints',
            'The same tokens, seen by two checkpoints of a run: a router that is still undecided '
            'late in training sends them elsewhere. What is kept beyond chance is 1 if nothing '
            'changes, and 0 if as much does as if experts were drawn from the load.',
            change_tables(changes, surveys),
        ),
    )
    return [Section(a, title, text, tables=tables) for a, title, text, tables in found if tables]


def _convergence(convergence: Convergence | None) -> list[Section]:
    if convergence is None:
        return []
    text = (
        'Theorem 4.1 of the paper says that routers settle long before the experts: their line '
        'would fall earlier. A learning rate that goes to zero brings everything to rest at the '
        'same time, so that the early part of the lines counts.'
    )
    title = 'On the way to the last checkpoint'
    columns = [Column(title, shown([convergence_picture(convergence)], 'checkpoints'))]
    tables = [convergence_table(convergence)]
    return [Section('convergence', title, text, columns, tables)]
