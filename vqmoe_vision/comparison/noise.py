"""How much of a difference between two rows is the seed."""

from __future__ import annotations

import math

import pandas as pd

from .frame import TEST, scores_of, tidy
from .spec import Comparison
from .statistics import detectable, differences, once_each
from .store import Results

PAIRS = 5


def noise_of(comparison: Comparison, results: Results) -> tuple[pd.DataFrame, float]:
    """Spread over seeds by row, and the difference that five pairs detect, by all rows."""
    scores = scores_of(tidy(comparison, results), TEST, comparison.metric)
    found = differences(scores, comparison.reference)
    lines, squares, freedom = {}, 0.0, 0
    distinct = once_each({comparison.reference: scores.get(comparison.reference, {}), **scores})
    for row, values in scores.items():
        line = {'seeds': len(values), 'std': pd.Series(values).std()}
        difference = found.get(row)
        if difference is not None and difference.pairs > 1:
            if row in distinct:
                squares += difference.std**2 * (difference.pairs - 1)
                freedom += difference.pairs - 1
            line |= {
                'pairs': difference.pairs,
                'std of differences': difference.std,
                'five pairs detect': detectable(difference.std, PAIRS),
            }
        lines[row] = line
    if not freedom:
        raise ValueError(
            f'no row of {comparison.name} shares two seeds with {comparison.reference}: '
            'the noise is not known yet'
        )
    frame = pd.DataFrame.from_dict(lines, orient='index')
    return frame, detectable(math.sqrt(squares / freedom), PAIRS)
