"""Tests, intervals and power for differences that are paired by seed.

Power is scipy's noncentral t distribution and a search in it, which statsmodels has too; ten lines
are less than another library. Tests hold both to tables and to answers by hand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import optimize, stats

LEVEL = 0.05
POWER = 0.8
FEW_SEEDS = 2  # of which a row alone says next to nothing of its noise
_ROUNDING = 1e-12  # of scores: what is left of differences that are equal
Scores = Mapping[str, Mapping[int, float]]  # by row and seed
Bits = Mapping[int, np.ndarray]  # by seed


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Of what a line and its band show at one place; one value alone deviates by nothing."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


@dataclass(frozen=True)
class Difference:
    """Of a row to a reference, over the seeds that both have."""

    each: Mapping[int, float]  # by seed
    mean: float  # nan without a pair, all below without two
    std: float  # of the differences
    low: float  # of the 95 % interval of the mean
    high: float
    p: float  # two-sided; nan where all differences are equal
    noise: float  # deviation behind interval and p: `std`, or that of several rows together
    freedom: int  # degrees of freedom of the noise

    @property
    def pairs(self) -> int:
        """How many seeds both have."""
        return len(self.each)


def paired_difference(row: Mapping[int, float], reference: Mapping[int, float]) -> Difference:
    """Compares two rows by Student's t-test for pairs."""
    seeds = sorted(row.keys() & reference.keys())
    a, b = (np.array([values[seed] for seed in seeds]) for values in (row, reference))
    differences = a - b
    each = dict(zip(seeds, differences.tolist(), strict=True))
    mean = float(differences.mean()) if seeds else math.nan
    if len(seeds) < 2:
        return Difference(each, mean, math.nan, math.nan, math.nan, math.nan, math.nan, 0)
    std = float(differences.std(ddof=1))
    # scipy divides by it; rounding leaves a little of differences that are equal
    if std <= _ROUNDING * max(abs(a).max(), abs(b).max()):
        return Difference(each, mean, 0.0, mean, mean, math.nan, 0.0, len(seeds) - 1)
    test = stats.ttest_rel(a, b)
    low, high = test.confidence_interval(1 - LEVEL)
    p = float(test.pvalue)
    return Difference(each, mean, std, float(low), float(high), p, std, len(seeds) - 1)


def differences(scores: Scores, reference: str) -> dict[str, Difference]:
    """The difference of every row to one of them."""
    base = scores.get(reference, {})
    return {row: paired_difference(own, base) for row, own in scores.items() if row != reference}


def once_each(scores: Scores) -> dict[str, Mapping[int, float]]:
    """Rows without those that have all scores of an earlier one: one run under several names."""
    first: dict[tuple, str] = {}
    for row, values in scores.items():
        first.setdefault(tuple(sorted(values.items())), row)
    return {row: scores[row] for row in first.values()}


def noise_of_all(scores: Scores, seeds: Sequence[int]) -> tuple[float, int]:
    """Deviation of a difference of two rows by chance, and its degrees of freedom; nan and 0."""
    distinct = once_each(scores).values()
    whole = [[row[seed] for seed in seeds] for row in distinct if row.keys() >= set(seeds)]
    left = np.array(whole)
    freedom = (len(left) - 1) * (len(seeds) - 1)
    if freedom < 1:
        return math.nan, 0
    # what is left when each row and each seed has a mean of its own, as in analysis of variance
    left -= left.mean(0)
    left -= left.mean(1, keepdims=True)
    noise = math.sqrt(2 * (left**2).sum() / freedom)
    return (0.0 if noise <= _ROUNDING * np.abs(whole).max() else noise), freedom


def with_noise(found: Difference, noise: float, freedom: int) -> Difference:
    """The same difference with another interval and p: for planned comparisons of two rows."""
    if not freedom or not noise or found.pairs < 2 or not any(found.each.values()):
        return found
    spread = stats.t(freedom, found.mean, noise / math.sqrt(found.pairs))
    low, high = map(float, spread.interval(1 - LEVEL))
    p = 2 * float(min(spread.cdf(0), spread.sf(0)))
    return replace(found, low=low, high=high, p=p, noise=noise, freedom=freedom)


def over_images(row: Bits, reference: Bits) -> tuple[float, float]:
    """The 95 % interval of a difference in percent over other images, at the seeds that both have.

    Args:
        row: Whether each image is right, (N,) bool by seed.
        reference: The same of the other.
    """
    seeds = row.keys() & reference.keys()
    if not seeds:
        return math.nan, math.nan
    each = np.mean([100.0 * row[seed] - 100.0 * reference[seed] for seed in seeds], axis=0)
    half = stats.norm.isf(LEVEL / 2) * each.std(ddof=1) / math.sqrt(len(each))
    return float(each.mean() - half), float(each.mean() + half)


def holm(p_values: Mapping[str, float], planned: int) -> dict[str, float]:
    """Corrects p by Holm's step-down method; those that are planned and not there count as 1."""
    names = list(p_values)
    corrected = np.array([p_values[name] for name in names], dtype=float)
    order = [i for i in np.argsort(corrected, kind='stable') if not math.isnan(corrected[i])]
    factors = planned - np.arange(len(order))
    corrected[order] = np.minimum(np.maximum.accumulate(corrected[order] * factors), 1)
    return dict(zip(names, corrected.tolist(), strict=True))


def detectable(std: float, pairs: int, level: float = LEVEL, freedom: int | None = None) -> float:
    """The smallest true difference that a paired t-test finds with `POWER`."""
    freedom = pairs - 1 if freedom is None else freedom
    most = 1.0  # scipy's power of an effect far beyond the answer does not converge
    while _power(most, pairs, level, freedom) < POWER:
        most *= 2
    missing = optimize.brentq(lambda d: _power(d, pairs, level, freedom) - POWER, 0, most)
    return std * missing


def _power(effect: float, pairs: int, level: float, freedom: int) -> float:
    """Of the two-sided paired t-test, of an effect over the deviation of differences."""
    shift = effect * math.sqrt(pairs)
    critical = stats.t.isf(level / 2, freedom)
    # the test statistic beyond the other end is too rare to count, and hard to compute
    with np.errstate(divide='ignore'):  # some versions of scipy divide by zero on their way
        return float(stats.nct.sf(critical, freedom, shift))
