"""Files of a comparison, made again from its rows: tables in four formats and figures."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from .checked import said_of_checks
from .curves import plot_curves
from .data import said_of_data
from .difference_figure import plot_differences
from .results import Results
from .routing import NUM_IMAGES, SEVERITY, SHIFTED_IMAGES, routing_table
from .routing_figure import plot_routing
from .sentences import sentences
from .shifts import shifted_scores
from .spec import Comparison
from .tables import frame_of, notes, scores_of, shift_table, shown

_LATEX = str.maketrans({sign: f'\\{sign}' for sign in '%_&#$'})  # pandas leaves a caption as it is
_SHIFTED = (
    'The same checkpoints on test images that are changed. A corruption is the mean over the '
    'fifteen of ImageNet-C at that severity. Intervals are those of single comparisons.'
)
_ROUTED = (
    f'What the routing of the last checkpoints is like on {NUM_IMAGES} test images; '
    'docs/routing-measures.md defines the measures. "Kept" is the share of tokens whose '
    'expert stays, beyond chance (1: all, 0: as if drawn from the load of the last), from the '
    f'checkpoint before to the last, and, on the first {SHIFTED_IMAGES} of the images, under '
    f'shifts; corruptions are those of ImageNet-C at severity {SEVERITY}.'
)


def write_tables(comparison: Comparison, results: Results, folder: Path) -> list[Path]:
    """Writes the table of a comparison; the same rows give the same bytes.

    Args:
        comparison: What was compared.
        results: What is there of it.
        folder: Gets `<name>.md`, `.tex`, `.csv` and `.json`.

    Returns:
        The files.

    Raises:
        ValueError: No run can be used.
    """
    frame = frame_of(comparison, results)
    table = shown(comparison, frame)
    said = sentences(comparison, frame, scores_of(comparison, results))
    remarks = notes(comparison, frame)
    missing = [run.name for run in results.missing]
    caption = ' '.join(remarks).translate(_LATEX)
    texts = {
        'md': _markdown(comparison, results, frame, table, [*remarks, *said]),
        'tex': table.to_latex(index=False, escape=True, caption=caption),
        'csv': frame.to_csv(index_label='row'),
        'json': json.dumps(
            {
                'rows': _plain(frame),
                'scores': scores_of(comparison, results),
                'notes': remarks,
                'sentences': said,
                'checks': said_of_checks(comparison, results),
                'left_out': results.left_out,
                'missing': missing,
            },
            indent=1,
            allow_nan=False,
        ),
    }
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for kind, text in texts.items():
        written.append(folder / f'{comparison.name}.{kind}')
        written[-1].write_text(text.rstrip() + '\n')
    return written


def draw_figures(comparison: Comparison, results: Results, folder: Path) -> list[Path]:
    """Draws the figures of a comparison; the same rows give the same bytes.

    Args:
        comparison: What was compared.
        results: What is there of it; some run can be used.
        folder: Which exists. Gets a `.png` and a `.pdf` each: `<name>-curves`,
            `<name>-differences`, and what was measured of `<name>-shifts`, `<name>-collapse`,
            `<name>-inconsistency`, `<name>-convergence`.

    Returns:
        The files.
    """
    as_trained = scores_of(comparison, results)
    figures = {
        'curves': plot_curves(comparison, results.usable),
        'differences': plot_differences(comparison, {'as in training': as_trained}),
        'shifts': plot_differences(comparison, shifted_scores(comparison, results)),
        **plot_routing(comparison, results),
    }
    written = []
    for name, figure in figures.items():
        if figure is None:
            continue
        # without the time and the version of matplotlib
        for kind, metadata in (('png', {'Software': None}), ('pdf', {'CreationDate': None})):
            written.append(folder / f'{comparison.name}-{name}.{kind}')
            figure.savefig(written[-1], metadata=metadata, dpi=110)
    return written


def _markdown(
    comparison: Comparison,
    results: Results,
    frame: pd.DataFrame,
    table: pd.DataFrame,
    lines: Sequence[str],
) -> str:
    left_out = [f'`{name}`: {reason}' for name, reason in results.left_out.items()]
    missing = [', '.join(run.name for run in results.missing)] if results.missing else []
    commands = [frame.command[row] for row in frame.index]
    parts = [
        f'# {comparison.name}',
        f'Made from the rows by `python tools/compare.py table`; commits {_commits(frame)}.',
        # numbers are strings already, with the digits that they deserve
        table.to_markdown(index=False, disable_numparse=True),
        _list([*lines, said_of_data(results), said_of_checks(comparison, results)]),
        *_told(_SHIFTED, shift_table(comparison, results)),
        *_told(_ROUTED, routing_table(comparison, results)),
        *(['Left out:', _list(left_out)] if left_out else []),
        *(['Not run:', _list(missing)] if missing else []),
        'The command of each row, with its first seed:',
        '```sh\n' + '\n'.join(f'OMP_NUM_THREADS=1 {command}' for command in commands) + '\n```',
    ]
    return '\n\n'.join(parts)


def _told(text: str, table: pd.DataFrame) -> list[str]:
    return [] if table.empty else [text, table.to_markdown(index=False, disable_numparse=True)]


def _commits(frame: pd.DataFrame) -> str:
    return ', '.join(sorted({c for line in frame.commits for c in line.split(', ')}))


def _list(lines: Sequence[str]) -> str:
    return '\n'.join(f'- {line}' for line in lines)


def _plain(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Lines of the frame, where JSON has no nan."""
    lines = frame.reset_index(names='row').to_dict(orient='records')
    return [
        {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in line.items()}
        for line in lines
    ]
