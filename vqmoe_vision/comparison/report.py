"""Files of a comparison, made again from its rows: tables in four formats and figures."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from vqmoe_vision.engine.cli import make_folder
from vqmoe_vision.moe.config import check

from .curves import plot_curves
from .difference_figure import plot_differences
from .outcome import Outcome
from .routing import SEVERITY, SHIFTED_IMAGES, routed_images, routing_table
from .routing_figure import plot_routing
from .sentences import said_of_checks, said_of_inputs, sentences
from .tables import frame_of, notes, shift_table, shown

_LATEX = str.maketrans({sign: f'\\{sign}' for sign in '%_&#$'})  # pandas leaves a caption as it is
_DPI = 110
_FIGURES = ('curves', 'differences', 'shifts', 'collapse', 'inconsistency', 'convergence')
_SHIFTED = (
    'The same checkpoints on test images that are changed. A corruption is the mean over the '
    'fifteen of ImageNet-C at that severity. Left is what a checkpoint still has of its own score '
    'on unchanged images; one without any has none. Intervals are those of single comparisons, and '
    'a difference says over how many pairs it is where the reference has other seeds.'
)
_ROUTED = (
    'What the routing of the last checkpoints is like on {images} test images; '
    'docs/routing-measures.md defines the measures. "Kept" is the share of tokens whose '
    'expert stays, beyond chance (1: all, 0: as if drawn from the load of the last), from the '
    f'checkpoint before to the last, and, on the first {SHIFTED_IMAGES} of the images, under '
    f'shifts; corruptions are those of ImageNet-C at severity {SEVERITY}.'
)


def write_tables(outcome: Outcome, folder: Path) -> list[Path]:
    """Writes the table of a comparison; the same rows give the same bytes."""
    frame = frame_of(outcome)
    table = shown(outcome, frame)
    said = sentences(outcome)
    remarks = [*_which(outcome), *notes(outcome, frame)]
    texts = {
        'md': _markdown(outcome, frame, table, [*remarks, *said]),
        'tex': _latex(table, ' '.join(remarks)),
        'csv': frame.to_csv(index_label='row'),
        'json': json.dumps(
            {
                'rows': _plain(frame),
                'scores': {row: outcome.scores[row] for row in frame.index},
                'notes': remarks,
                'sentences': said,
                'checks': said_of_checks(outcome.comparison, outcome.results),
                'left_out': outcome.results.left_out,
                'missing': [run.name for run in outcome.results.missing],
            },
            indent=1,
            allow_nan=False,
        ),
    }
    make_folder(folder)
    written = []
    for kind, text in texts.items():
        written.append(_file(folder / f'{outcome.name}.{kind}'))
        written[-1].write_text(text.rstrip() + '\n')
    return written


def _latex(table: pd.DataFrame, caption: str) -> str:
    text = table.to_latex(index=False, escape=True, caption=caption.translate(_LATEX))
    # pandas leaves this sign, and the fonts that LaTeX starts with print another in its place
    return text.replace('<', r'\textless{}')


def draw_figures(outcome: Outcome, folder: Path) -> list[Path]:
    """Draws the figures of a comparison; the same rows give the same bytes."""
    written = []
    figures = _figures(outcome)
    for name in _FIGURES:
        # without the time and the version of matplotlib
        for kind, metadata in (('png', {'Software': None}), ('pdf', {'CreationDate': None})):
            file = _file(folder / f'{outcome.name}-{name}.{kind}')
            if name not in figures:
                file.unlink(missing_ok=True)
                continue
            figures[name].savefig(file, metadata=metadata, dpi=_DPI)
            written.append(file)
    return written


def write_images(outcome: Outcome, folder: Path) -> list[Path]:
    """Draws the figures that documents show, as `Comparison.images` names them."""
    comparison = outcome.comparison
    if outcome.partial:
        raise ValueError('--images is not possible with a part: documents show all rows and seeds')
    if outcome.turned:
        raise ValueError(
            '--images is not possible with --reference: documents show the differences to '
            f'{outcome.planned_reference}'
        )
    if not comparison.images:
        raise ValueError(f'--images: {comparison.name} names no images')
    frame_of(outcome)  # says so where there is nothing to draw
    make_folder(folder)
    figures, written = _figures(outcome), []
    for figure, name in comparison.images.items():
        if figure not in figures:
            raise ValueError(f'images: {figure!r} is not drawn; drawn are {", ".join(figures)}')
        written.append(_file(folder / f'{name}.png'))
        drawn_by = {'Software': f'matplotlib {matplotlib.__version__}'}
        figures[figure].savefig(written[-1], metadata=drawn_by, dpi=_DPI)
    return written


def _file(path: Path) -> Path:
    check(not path.is_dir(), 'file', str(path), 'it is a folder; move it away')
    return path


def _figures(outcome: Outcome) -> dict[str, Figure]:
    """By name, those that there is something to draw of."""
    comparison, differences = outcome.comparison, outcome.differences
    as_trained = {row: differences[row] for row in outcome.rows if row in differences}
    # curves and routing are the same, whatever is the reference
    turned = outcome.turned
    figures = {
        **({} if turned else {'curves': plot_curves(comparison, outcome.results.usable)}),
        'differences': plot_differences(comparison, {'as in training': as_trained}),
        'shifts': plot_differences(comparison, outcome.shifted_differences),
        **({} if turned else plot_routing(comparison, outcome.results)),
    }
    assert figures.keys() <= {*_FIGURES}
    return {name: figure for name, figure in figures.items() if figure is not None}


def _which(outcome: Outcome) -> list[str]:
    """Which part is shown and from where it is looked at; nothing of the whole as it is planned."""
    lines = []
    if outcome.partial:
        rows, seeds = ', '.join(outcome.rows), ', '.join(map(str, outcome.seeds))
        lines.append(f'A part of {outcome.comparison.name}: rows {rows}; seeds {seeds}.')
    if outcome.turned:
        lines.append(
            f'A second look at the same runs: differences are to {outcome.comparison.reference}, '
            f'where {outcome.planned_reference} is the reference that the comparison plans. p is '
            'corrected for all rows beside this one, and not for those beside the other as well.'
        )
    return lines


def _markdown(
    outcome: Outcome, frame: pd.DataFrame, table: pd.DataFrame, lines: Sequence[str]
) -> str:
    comparison, results = outcome.comparison, outcome.results
    left_out = [f'`{name}`: {reason}' for name, reason in results.left_out.items()]
    missing = [', '.join(run.name for run in results.missing)] if results.missing else []
    option = f' --reference {comparison.reference}' if outcome.turned else ''
    routed = _ROUTED.replace('{images}', routed_images(results))
    parts = [
        f'# {comparison.name}'
        + (f', differences to {comparison.reference}' if outcome.turned else '')
        + (', a part' if outcome.partial else ''),
        f'Made from the rows by `python tools/compare.py table{option}`; commits '
        f'{_commits(frame)}.',
        # numbers are strings already, with the digits that they deserve
        table.to_markdown(index=False, disable_numparse=True),
        _list([*lines, *said_of_inputs(comparison, results), said_of_checks(comparison, results)]),
        *_told(_SHIFTED, shift_table(outcome)),
        *([] if outcome.turned else _told(routed, routing_table(comparison, results))),
        *(['Left out:', _list(left_out)] if left_out else []),
        *(['Not run:', _list(missing)] if missing else []),
        *_commands_of(outcome, frame),
    ]
    return '\n\n'.join(parts)


def _commands_of(outcome: Outcome, frame: pd.DataFrame) -> list[str]:
    if outcome.turned:
        return [
            'How the rows route, and the command of each, are the same for any reference: '
            f'{outcome.comparison.name}.md has them.'
        ]
    commands = [f'OMP_NUM_THREADS=1 {frame.command[row]}' for row in frame.index]
    return [
        'The command of each row, with its first seed:',
        '```sh\n' + '\n'.join(commands) + '\n```',
    ]


def _told(text: str, table: pd.DataFrame) -> list[str]:
    return [] if table.empty else [text, table.to_markdown(index=False, disable_numparse=True)]


def _commits(frame: pd.DataFrame) -> str:
    return ', '.join(sorted({c for line in frame.commits for c in line.split(', ')}))


def _list(lines: Sequence[str]) -> str:
    # a star at the beginning of a line would begin a list in the list
    return '\n'.join('- ' + (f'\\{line}' if line.startswith('*') else line) for line in lines)


def _plain(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Lines of the frame; JSON has neither nan nor infinity."""
    lines = frame.reset_index(names='row').to_dict(orient='records')
    return [{name: _finite(value) for name, value in line.items()} for line in lines]


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
