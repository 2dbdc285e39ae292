"""Tests, intervals and power for differences that are paired by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

LEVEL = 0.05
POWER = 0.8
_MOST_PAIRS = 1000


@dataclass(frozen=True)
class Difference:
    """Of a row to a reference, over the seeds that both have.

    Args:
        pairs: How many seeds those are.
        mean: Of the differences; nan without a pair.
        std: Of the differences, with one degree of freedom less; nan below two pairs.
        low: Lower end of the 95 % confidence interval of the mean; nan below two pairs.
        high: Its upper end.
        p: Of the two-sided paired t-test; nan where it is not defined, because there are less than
            two pairs or all differences are equal.
    """

    pairs: int
    mean: float
    std: float
    low: float
    high: float
    p: float


def paired_difference(row: Mapping[int, float], reference: Mapping[int, float]) -> Difference:
    """Compares two rows by Student's t-test for pairs.

    Args:
        row: Values by seed.
        reference: The same.
    """
    seeds = sorted(row.keys() & reference.keys())
    a, b = (np.array([values[seed] for seed in seeds]) for values in (row, reference))
    differences = a - b
    mean = float(differences.mean()) if seeds else math.nan
    if len(seeds) < 2:
        return Difference(len(seeds), mean, math.nan, math.nan, math.nan, math.nan)
    std = float(differences.std(ddof=1))
    # scipy divides by it; rounding leaves a little of differences that are equal
    if std <= 1e-12 * max(abs(a).max(), abs(b).max()):
        return Difference(len(seeds), mean, 0.0, mean, mean, math.nan)
    test = stats.ttest_rel(a, b)
    low, high = test.confidence_interval(1 - LEVEL)
    return Difference(len(seeds), mean, std, float(low), float(high), float(test.pvalue))


def holm(p_values: Sequence[float]) -> list[float]:
    """Corrects for the number of comparisons, by Holm's step-down method.

    Args:
        p_values: Those that are nan stay so and do not count.
    """
    corrected = np.array(p_values, dtype=float)
    order = [i for i in np.argsort(corrected, kind='stable') if not math.isnan(corrected[i])]
    factors = np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(corrected[order] * factors), 1)
    return corrected.tolist()


def detectable(std: float, pairs: int, level: float = LEVEL) -> float:
    """The smallest true difference that a paired t-test finds with `POWER`.

    Args:
        std: Of the differences of pairs.
        pairs: At least 2.
        level: Of the test.
    """
    most = 1.0  # scipy's power of an effect far beyond the answer does not converge
    while _power(most, pairs, level) < POWER:
        most *= 2
    return std * optimize.brentq(lambda effect: _power(effect, pairs, level) - POWER, 0, most)


def pairs_needed(std: float, difference: float, level: float = LEVEL) -> int | None:
    """How many pairs find a true difference with `POWER`.

    Args:
        std: Of the differences of pairs, above 0.
        difference: In the same unit.
        level: Of the test.

    Returns:
        None if that is more than a thousand.
    """
    effect = abs(difference) / std
    enough = (n for n in range(2, _MOST_PAIRS + 1) if _power(effect, n, level) >= POWER)
    return next(enough, None)


def _power(effect: float, pairs: int, level: float) -> float:
    """Of the two-sided paired t-test, from the noncentral t distribution.

    Args:
        effect: True difference over the standard deviation of differences.
        pairs: At least 2.
        level: Of the test.
    """
    freedom, shift = pairs - 1, effect * math.sqrt(pairs)
    critical = stats.t.isf(level / 2, freedom)
    # the test statistic beyond the other end is too rare to count, and hard to compute
    with np.errstate(divide='ignore'):  # some versions of scipy divide by zero on their way
        return float(stats.nct.sf(critical, freedom, shift))
