"""Tables of the report: numbers with what they mean, shifts, and changes between checkpoints."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from .drawing import percent
from .survey import Survey

# By the last part of a number's name; docs/routing-measures.md has definitions and sources.
MEANINGS = {
    'load_entropy': '1: all experts take as many tokens; 0: one takes all',
    'load_variation': 'spread of the load over its mean; 0: even',
    'dead_experts': 'experts that no token went to',
    'code_perplexity': 'how many codes are in use, weighted by how often',
}


@dataclass(frozen=True)
class Change:
    """How the routing of the same tokens differs between two checkpoints of a run.

    Args:
        before: Says which checkpoint.
        after: Says which other one.
        shares: By decider, such as 'blocks.1.mlp.router': share of tokens whose first expert is
            another one.
    """

    before: str
    after: str
    shares: dict[str, float]


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Args:
        name: Its head.
        cells: As shown; '' where there is nothing.
        meaning: Of the head, in a line.
    """

    name: str
    cells: list[str]
    meaning: str = ''


@dataclass(frozen=True)
class Table:
    """A table of a page.

    Args:
        caption: What it is.
        corner: Head of the first column.
        heads: Of the other columns.
        rows: Lines.
    """

    caption: str
    corner: str
    heads: list[str]
    rows: list[Row] = field(default_factory=list)


def number_tables(surveys: Sequence[Survey]) -> list[Table]:
    """A table per layer: its numbers, a column for each model.

    Args:
        surveys: At least one.
    """
    layers = list(dict.fromkeys(name for survey in surveys for name in survey.layers))
    tables = []
    for layer in layers:
        found = [s.layers[layer].numbers if layer in s.layers else {} for s in surveys]
        names = dict.fromkeys(name for numbers in found for name in numbers)
        rows = [
            Row(
                name,
                [f'{numbers[name]:.4g}' if name in numbers else '' for numbers in found],
                MEANINGS.get(name.rpartition('/')[2], ''),
            )
            for name in names
        ]
        if rows:
            tables.append(Table(layer, 'number', [s.title for s in surveys], rows))
    return tables


def shift_tables(surveys: Sequence[Survey]) -> list[Table]:
    """A table per model: share of tokens whose expert changes, by shift and decider.

    Args:
        surveys: Those without shifts are left out.
    """
    return [
        _shares(
            f'{survey.title}: share of tokens whose first expert changes', 'shift', survey.shifts
        )
        for survey in surveys
        if survey.shifts
    ]


def change_table(changes: Sequence[Change]) -> Table:
    """Share of tokens whose expert changes from one checkpoint to another.

    Args:
        changes: A line of the table each.
    """
    rows = {f'{change.before} to {change.after}': change.shares for change in changes}
    return _shares('Share of tokens whose first expert changes', 'checkpoints', rows)


def _shares(caption: str, corner: str, rows: dict[str, dict[str, float]]) -> Table:
    deciders = list(dict.fromkeys(name for shares in rows.values() for name in shares))
    lines = [
        Row(name, [percent(shares[d]) if d in shares else '' for d in deciders])
        for name, shares in rows.items()
    ]
    return Table(caption, corner, deciders, lines)
