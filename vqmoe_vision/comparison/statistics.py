"""Tests, intervals and power for differences that are paired by seed, and their mean."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import special, stats

LEVEL = 0.05
POWER = 0.8
_ROUNDING = 1e-12  # of scores: what is left of differences that are equal
Scores = Mapping[str, Mapping[int, float]]  # by row and seed
Bits = Mapping[int, np.ndarray]  # by seed


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
    low, high = map(float, test.confidence_interval(1 - LEVEL))
    return Difference(each, mean, std, low, high, float(test.pvalue), std, len(seeds) - 1)


def differences(scores: Scores, reference: str) -> dict[str, Difference]:
    """The difference of every row to one of them."""
    base = scores.get(reference, {})
    return {row: paired_difference(own, base) for row, own in scores.items() if row != reference}


def _residual_noise(scores: Scores) -> tuple[float, int]:
    """Squares of what is left of scores by row and seed, and their degrees of freedom.

    It is what is left when each row and each seed has a mean of its own, as in analysis of
    variance. Rows that lack a seed do not count, nor does one run under a second name.
    """
    seeds = sorted({seed for row in scores.values() for seed in row})
    whole = {
        tuple(row[seed] for seed in seeds) for row in scores.values() if len(row) == len(seeds)
    }
    if len(whole) < 2 or len(seeds) < 2:
        return 0.0, 0
    left = np.array(sorted(whole))
    freedom = (len(left) - 1) * (len(seeds) - 1)
    left -= left.mean(0)
    left -= left.mean(1, keepdims=True)
    squares = float((left**2).sum())  # rounding leaves a little of what is equal
    return (0.0 if squares <= (_ROUNDING * np.abs([*whole]).max()) ** 2 else squares), freedom


def pooled_noise(scores: Scores, others: Iterable[Scores] = ()) -> tuple[float, int]:
    """Deviation of a difference of two rows by chance, and its degrees of freedom; nan and 0.

    Args:
        scores: Of the comparison, by row and seed.
        others: Comparisons of the same budget. One counts unless an F-test at 5 % finds that its
            variance is another; all count where the comparison has no variance of its own.
    """
    squares, freedom = first_squares, first_freedom = _residual_noise(scores)
    for more, degrees in map(_residual_noise, others):
        if not degrees:
            continue
        if first_squares and first_freedom:
            ratio = more / degrees / (first_squares / first_freedom)
            spread = stats.f(degrees, first_freedom)
            if 2 * min(spread.cdf(ratio), spread.sf(ratio)) < LEVEL:
                continue
        squares, freedom = squares + more, freedom + degrees
    # a difference of two rows has twice the variance
    return math.sqrt(2 * squares / freedom) if freedom else math.nan, freedom


def with_noise(found: Difference, noise: float, freedom: int) -> Difference:
    """The same difference with the interval and p of a noise that is known better."""
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


def equivalence(found: Difference, margin: float) -> float:
    """The p of two one-sided tests: that the difference lies outside of a margin to both sides."""
    if found.pairs < 2 or not found.noise:
        return math.nan
    spread = stats.t(found.freedom, found.mean, found.noise / math.sqrt(found.pairs))
    return float(max(spread.cdf(-margin), spread.sf(margin)))


@dataclass(frozen=True)
class Pooled:
    """The mean of a difference over comparisons whose true differences vary."""

    mean: float
    low: float  # of the 95 % interval of the mean
    high: float
    predicted_low: float  # of the 95 % interval of the true difference in another comparison
    predicted_high: float
    heterogeneity: float  # I^2: share of the variance that is more than chance, from 0 to 1


def together(means: Sequence[float], variances: Sequence[float]) -> Pooled:
    """Pool by DerSimonian and Laird, with the interval of Hartung, Knapp, Sidik and Jonkman.

    It is of Student's t with one degree of freedom less than there are comparisons, and never
    narrower than the normal interval (Jackson et al., Statistics in Medicine 2017).
    """
    y, weights, freedom = np.array(means), 1 / np.array(variances), len(means) - 1
    chi_square = (weights * (y - np.average(y, weights=weights)) ** 2).sum()
    excess = max(0.0, chi_square - freedom)
    between = excess / (weights.sum() - (weights**2).sum() / weights.sum())
    weights = 1 / (np.array(variances) + between)
    mean, total = np.average(y, weights=weights, returned=True)
    variance = (weights * (y - mean) ** 2).sum() / (freedom * total)
    quantile, normal = stats.t.isf(LEVEL / 2, freedom), stats.norm.isf(LEVEL / 2)
    half = max(quantile * math.sqrt(variance), normal / math.sqrt(total))
    further = math.hypot(half, quantile * math.sqrt(between))
    share = excess / chi_square if excess else 0.0
    bounds = mean - half, mean + half, mean - further, mean + further
    return Pooled(*map(float, (mean, *bounds, share)))


def detectable(std: float, pairs: int, freedom: int) -> float:
    """The smallest true difference that a two-sided paired t-test finds with `POWER`."""
    # the test statistic beyond the other end is too rare to count
    effect = special.nctdtrinc(freedom, 1 - POWER, stats.t.isf(LEVEL / 2, freedom))
    return std * float(effect) / math.sqrt(pairs)
