"""Tables of the report: numbers with what they mean, shifts, and changes between checkpoints."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from .drawing import percent
from .measures import kept_beyond_chance
from .surveyed import Survey

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
BY_CHANCE = 'by chance'


@dataclass(frozen=True)
class Change:
    """How the routing of the same tokens differs between two checkpoints of a run."""

    before: str
    after: str
    shares: dict[str, float]  # of tokens with another first expert, by decider


@dataclass(frozen=True)
class Convergence:
    """How much of their way the parts of the layers have left at the checkpoints of a run."""

    checkpoints: list[str]  # titles, oldest first
    parts: dict[str, dict[str, list[float]]]  # as `checkpoints.convergence`

    def left(self, part: str) -> list[float]:
        """What is left of a part's way to the last checkpoint, 1 at the first."""
        return self.parts[part]['distance']


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    name: str
    cells: list[str]
    meaning: str = ''


@dataclass(frozen=True)
class Table:
    """A table of a page."""

    caption: str
    corner: str
    heads: list[str]
    rows: list[Row] = field(default_factory=list)


def number_tables(surveys: Sequence[Survey]) -> list[Table]:
    """A table per layer: its numbers, a column for each model."""
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
    """A table per model: share of tokens whose expert changes, by shift and decider."""
    said = 'share of tokens whose first expert changes'
    tables = []
    for survey in surveys:
        if any(survey.shifts.values()):  # SoftMoE has no expert that could change
            chance = _by_chance(survey)
            caption = f'{survey.title}: {said}'
            tables.append(_shares(caption, 'shift', {BY_CHANCE: chance, **survey.shifts}))
            tables.append(_kept('shift', survey.shifts, chance, f'{survey.title}: '))
    return tables


def _by_chance(survey: Survey) -> dict[str, float]:
    end = '/changed_by_chance'
    return {
        f'{name}.{number.removesuffix(end)}': value
        for name, layer in survey.layers.items()
        for number, value in layer.numbers.items()
        if number.endswith(end)
    }


def change_tables(changes: Sequence[Change], surveys: Sequence[Survey]) -> list[Table]:
    """Share of tokens whose expert changes from one checkpoint to another, and what is kept."""
    rows = {f'{change.before} to {change.after}': change.shares for change in changes}
    if not any(rows.values()):
        return []
    chance = next((_by_chance(s) for s in surveys if s.title == changes[-1].after), {})
    caption = 'Share of tokens whose first expert changes'
    tables = [_shares(caption, 'checkpoints', {BY_CHANCE: chance, **rows})]
    return [*tables, _kept('checkpoints', rows, chance)] if chance else tables


def convergence_table(convergence: Convergence) -> Table:
    """What is left of the way to the last checkpoint, by checkpoint and part."""
    rows = {
        title: {part: convergence.left(part)[number] for part in convergence.parts}
        for number, title in enumerate(convergence.checkpoints)
    }
    return _shares('Share of the way that is left to the last', 'checkpoint', rows)


def _kept(
    corner: str, rows: dict[str, dict[str, float]], chance: dict[str, float], of: str = ''
) -> Table:
    caption = f'{of}{"kept" if of else "Kept"} beyond chance: 1 is all, 0 as if drawn anew'
    possible = [decider for decider, share in chance.items() if share > 0]
    lines = []
    for name, shares in rows.items():
        kept = {d: kept_beyond_chance(shares[d], chance[d]) for d in possible if d in shares}
        lines.append(Row(name, [f'{kept[d]:.2f}' if d in kept else '' for d in possible]))
    return Table(caption, corner, possible, lines)


def _shares(caption: str, corner: str, rows: dict[str, dict[str, float]]) -> Table:
    deciders = list(dict.fromkeys(name for shares in rows.values() for name in shares))
    lines = [
        Row(name, [percent(shares[d]) if d in shares else '' for d in deciders])
        for name, shares in rows.items()
        if shares
    ]
    return Table(caption, corner, deciders, lines)
