"""The sentences that the numbers of a table allow."""

from __future__ import annotations

import pandas as pd

from .spec import Comparison
from .statistics import LEVEL, Difference, detectable, holm, paired_difference, pairs_needed

Scores = dict[str, dict[int, float]]


def sentences(comparison: Comparison, frame: pd.DataFrame, scores: Scores) -> list[str]:
    """One sentence for each row, and one for each control that a row does not beat.

    Args:
        comparison: What was compared.
        frame: As `tables.frame_of`.
        scores: The metric by row and seed.
    """
    reference = comparison.reference
    said = []
    rows = frame.index.drop(reference, errors='ignore')
    for row in rows:
        difference = paired_difference(scores[row], scores.get(reference, {}))
        said.append(verdict(row, reference, difference, frame.p_holm[row], len(rows)))
    for control in comparison.controls:
        said += _against_control(comparison, control, scores)
    return said


def verdict(
    row: str, reference: str, difference: Difference, corrected_p: float, comparisons: int
) -> str:
    """What may be said of a row and the reference.

    Args:
        row: Its name.
        reference: The other's.
        difference: Row minus reference; more is better.
        corrected_p: Its p after correction for the number of rows.
        comparisons: That number; power is that of a test which stands all of them.
    """
    pairs, d = difference.pairs, difference.mean
    if pairs < 2:
        return f'{row} and {reference} have {pairs} seeds in common: nothing can be said of them.'
    if difference.std == 0:
        return f'{row} and {reference} differ by exactly {d:+.2f} at each of {pairs} seeds.'
    interval = f'{d:+.2f}, 95 % interval {difference.low:+.2f} to {difference.high:+.2f}'
    if corrected_p < LEVEL:
        better = 'better' if d > 0 else 'worse'
        return (
            f'{row} is {better} than {reference} at this budget: {interval}, '
            f'p = {corrected_p:.2g} after correction, {pairs} seeds.'
        )
    level = LEVEL / comparisons
    needed = pairs_needed(difference.std, d, level)
    if needed is None:
        more = f'more than a thousand would be needed for one of {abs(d):.2f}'
    else:
        # at 80 % power what was seen would have been significant: more are needed than there are
        more = f'about {needed - pairs} more would tell one of {abs(d):.2f}'
    return (
        f'{row} and {reference} cannot be told apart at this budget ({interval}): {pairs} seeds '
        f'tell a difference of {detectable(difference.std, pairs, level):.2f}, {more}.'
    )


def _against_control(comparison: Comparison, control: str, scores: Scores) -> list[str]:
    rows = [r for r in scores if r not in (comparison.reference, *comparison.controls)]
    differences = {r: paired_difference(scores[r], scores.get(control, {})) for r in rows}
    corrected = holm([difference.p for difference in differences.values()])
    said = []
    for (row, difference), p in zip(differences.items(), corrected, strict=True):
        if difference.pairs >= 2 and not (p < LEVEL and difference.mean > 0):
            said.append(
                f'{row} does not beat the control {control}: {difference.mean:+.2f}, 95 % interval '
                f'{difference.low:+.2f} to {difference.high:+.2f}.'
            )
    return said
