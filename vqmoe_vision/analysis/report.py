"""One page that shows what the experts of a model do, and opens without a network.

Needs matplotlib and jinja2 (extra `analyze`).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from .report_sections import sections_of
from .report_tables import Change, Convergence
from .routing_curves import History
from .surveyed import Survey


def write_report(
    surveys: Sequence[Survey],
    out: Path,
    history: Mapping[str, History] | None = None,
    changes: Sequence[Change] = (),
    convergence: Convergence | None = None,
) -> list[Path]:
    """Writes `report.html`, which holds all it shows, its pictures as files, and `numbers.json`."""
    titles = [survey.title for survey in surveys]
    if not any(survey.layers for survey in surveys):
        raise ValueError('surveys: none has a layer with experts, there is nothing to report')
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
    for shown in (p for s in sections for column in s.columns for p in column.pictures):
        written.append(pictures / shown.file)
        written[-1].write_bytes(shown.png)
    return written
