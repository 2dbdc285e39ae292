"""Known answers of tests, intervals and power."""

import math

import pytest

from vqmoe_vision.comparison.statistics import (
    detectable,
    holm,
    paired_difference,
    pairs_needed,
)


def test_paired_t_test_by_hand() -> None:
    row, reference = {1: 11.0, 2: 22.0, 3: 33.0, 4: 0.0}, {1: 10.0, 2: 20.0, 3: 30.0, 9: 0.0}
    found = paired_difference(row, reference)
    # differences 1, 2, 3: mean 2, standard deviation 1, t = 2 sqrt(3) with two degrees of freedom,
    # whose distribution is 1/2 + t / (2 sqrt(2 + t^2)): p = 1 - sqrt(12 / 14); its 97.5 % point is
    # 0.95 sqrt(2 / (1 - 0.95^2)) = 4.30265
    assert (found.pairs, found.mean, found.std) == (3, pytest.approx(2), pytest.approx(1))
    assert found.p == pytest.approx(1 - math.sqrt(12 / 14))
    half = 0.95 * math.sqrt(2 / (1 - 0.95**2)) / math.sqrt(3)
    assert (found.low, found.high) == (pytest.approx(2 - half), pytest.approx(2 + half))


def test_spread_of_the_pair_itself_does_not_count() -> None:
    """Seeds differ by 40, rows by about 1: paired, that is no noise."""
    found = paired_difference({1: 11.0, 2: 51.1, 3: 31.0}, {1: 10.0, 2: 50.0, 3: 30.1})
    assert found.p < 0.01


@pytest.mark.parametrize(('row', 'pairs'), [({}, 0), ({1: 3.0}, 1)])
def test_nothing_is_tested_below_two_pairs(row: dict[int, float], pairs: int) -> None:
    found = paired_difference(row, {1: 2.0, 2: 5.0})
    assert found.pairs == pairs
    assert all(math.isnan(value) for value in (found.std, found.low, found.high, found.p))


def test_equal_differences_have_no_p() -> None:
    found = paired_difference({1: 0.3, 2: 0.7}, {1: 0.1, 2: 0.5})  # 0.2 but for rounding
    assert (found.std, found.low, found.high) == (0, found.mean, found.mean)
    assert math.isnan(found.p)


def test_holm_by_hand() -> None:
    # three that count: 0.01 x 3, then 0.03 x 2, then 0.04 x 1, which may not fall below the second
    assert holm([0.04, math.nan, 0.01, 0.03]) == pytest.approx(
        [0.06, math.nan, 0.03, 0.06], nan_ok=True
    )
    assert holm([0.9, 0.8]) == [1, 1]


@pytest.mark.parametrize(('effect', 'pairs'), [(0.5, 34), (0.8, 15), (1.0, 10)])
def test_pairs_that_tables_of_power_give(effect: float, pairs: int) -> None:
    """Of the two-sided paired t-test at 5 % with 80 % power."""
    assert pairs_needed(2.0, -2.0 * effect) == pairs
    assert detectable(2.0, pairs) <= 2.0 * effect < detectable(2.0, pairs - 1)


def test_no_number_of_pairs_tells_nothing_apart() -> None:
    assert pairs_needed(1.0, 0.0) is None
