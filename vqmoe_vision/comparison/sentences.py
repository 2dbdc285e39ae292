"""The sentences that the numbers of a table allow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from . import cells
from .inputs import SPLITS, data_of
from .outcome import Outcome
from .results import Results
from .spec import STARTS, Comparison
from .statistics import FEW_SEEDS, LEVEL, Difference, detectable, pairs_needed


def sentences(outcome: Outcome) -> list[str]:
    """One sentence for each row, and one for each control that a row does not beat."""
    reference, seeds = outcome.comparison.reference, len(outcome.comparison.seeds)
    said = [
        verdict(
            row,
            reference,
            difference,
            outcome.corrected[row],
            outcome.planned,
            seeds,
            outcome.hidden,
        )
        for row, difference in outcome.differences.items()
        if row in outcome.rows
    ]
    for control in outcome.comparison.controls:
        if control != reference:
            said += _against_control(outcome, control)
    return said


def verdict(
    row: str,
    reference: str,
    difference: Difference,
    corrected_p: float,
    comparisons: int,  # that the p is corrected for
    seeds: int,  # that there will be: every look before is another chance
    hidden: int = 0,  # of them, not shown
) -> str:
    """What may be said of a row and the reference."""
    pairs, d = difference.pairs, difference.mean
    if pairs < 2:
        common = 'one seed' if pairs else 'no seed'
        return f'{row} and {reference} have {common} in common: nothing can be said of them.'
    if pairs < seeds:
        return _undecided(f'{row} and {reference}', difference, seeds, hidden)
    if said := _without_noise(f'{row} and {reference}', difference):
        return said
    interval = f'{d:+.2f}, 95 % interval {cells.ends(difference)}'
    if corrected_p < LEVEL:
        return (
            f'{row} {_told(difference, seeds)} {reference} at this budget: {interval}, '
            f'p = {corrected_p:.2g} after correction, {pairs} seeds.'
        )
    level = LEVEL / comparisons
    needed = pairs_needed(difference.noise, d, level)
    if needed is None:
        more = f'more than a thousand would be needed for one of {abs(d):.2f}'
    else:
        # at 80 % power what was seen would have been significant: more are needed than there are
        more = f'about {needed - pairs} more would tell one of {abs(d):.2f}'
    least = detectable(difference.noise, pairs, level, difference.freedom)
    by = ', by the noise of all rows,' if seeds <= FEW_SEEDS else ''
    return (
        f'{row} and {reference} cannot be told apart at this budget ({interval}): {pairs} seeds'
        f'{by} tell a difference of {least:.2f}, {more}.'
    )


def _told(difference: Difference, seeds: int) -> str:
    more = difference.mean > 0
    if seeds <= FEW_SEEDS:  # which is worth more seeds, and no verdict yet
        return 'stands out above' if more else 'stands out below'
    return 'is better than' if more else 'is worse than'


def _undecided(pair: str, difference: Difference, seeds: int, hidden: int) -> str:
    found = f'{difference.mean:+.2f} (95 % interval {cells.ends(difference)})'
    if difference.pairs + hidden == seeds:
        return f'{pair}: {found} by the {difference.pairs} of {seeds} seeds shown, no verdict.'
    return f'{pair}, not finished: {difference.pairs} of {seeds} seeds; so far {found}, no verdict.'


def _without_noise(pair: str, difference: Difference) -> str | None:
    """What is said instead of a verdict where the noise is not known."""
    pairs, mean = difference.pairs, f'{difference.mean:+.2f}'
    if difference.noise == 0:  # of which there is no p
        return f'{pair} differ by exactly {mean} at each of {pairs} seeds.'
    if difference.freedom == 1:
        ends = cells.ends(difference)
        return (
            f'{pair} differ by {mean} over {pairs} seeds (95 % interval {ends}), and no other row '
            'tells their noise: no verdict.'
        )
    return None


def _against_control(outcome: Outcome, control: str) -> list[str]:
    differences, corrected = outcome.against(control)
    seeds = len(outcome.comparison.seeds)
    said = []
    for row, difference in differences.items():
        if row not in outcome.rows or difference.pairs < 2:
            continue
        pair = f'{row} and the control {control}'
        if not outcome.finished(difference):
            said.append(_undecided(pair, difference, seeds, outcome.hidden))
        elif instead := _without_noise(pair, difference):
            said.append(instead)
        elif not (corrected[row] < LEVEL and difference.mean > 0):
            said.append(
                f'{row} does not beat the control {control}: {difference.mean:+.2f}, 95 % interval '
                f'{cells.ends(difference)}, {difference.pairs} seeds.'
            )
    return said


def said_of_inputs(comparison: Comparison, results: Results) -> list[str]:
    """Which data the rows of a table have seen, and of which it is known what they started from."""
    return [_said_of_data(results), *_said_of_starts(comparison, results)]


def _said_of_data(results: Results) -> str:
    seen: dict[str, list[str]] = {split: [] for split in SPLITS}
    unknown = len(results.usable)
    for content in results.usable.values():
        unknown -= 'data' in content
        for split, _, data in data_of(content):
            if data not in seen[split]:
                seen[split].append(data)
    parts = [f'{split} {" and ".join(found)}' for split, found in seen.items() if found]
    if not parts:
        return 'Which data the runs have seen is not recorded.'
    line = f'Data: {"; ".join(parts)}.'
    return line + (f' Not recorded of {unknown} of {len(results.usable)} runs.' if unknown else '')


def _said_of_starts(comparison: Comparison, results: Results) -> list[str]:
    started = [
        bool(content.get('starting_weights'))
        for (row, _), content in results.usable.items()
        if STARTS.search(' '.join(comparison.rows[row]))
    ]
    if not started:
        return []
    known, total = sum(started), len(started)
    same = '; where two name the same run, those were the same weights' if known > 1 else ''
    return [f'Which weights it started from is recorded of {known} of {total} started runs{same}.']


def said_of_checks(comparison: Comparison, results: Results) -> str:
    """How many rows have been checked and where, and which have not."""
    total, right = len(results.usable), results.checked
    open_ = [key for key in results.usable if key not in right]
    at = ', '.join(f'{commit} ({n})' for commit, n in sorted(Counter(right.values()).items()))
    found = f'The first losses of {len(right)} of {total} runs came out again when checked'
    line = f'{found}, at {"commits" if len(set(right.values())) > 1 else "commit"} {at}.'
    if not right:
        line = f'None of the {total} runs has been checked: `tools/compare.py check` does so.'
    elif open_:
        line += f' Not checked: {_by_row(comparison, open_)}.'
    return line


def _by_row(comparison: Comparison, keys: Iterable[tuple[str, int]]) -> str:
    seeds: dict[str, list[int]] = {}
    for row, seed in keys:
        seeds.setdefault(row, []).append(seed)
    rows = filter(seeds.__contains__, comparison.rows)
    return ', '.join(f'{row} ({", ".join(map(str, sorted(seeds[row])))})' for row in rows)
