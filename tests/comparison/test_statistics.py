"""Known answers of tests, intervals and power."""

import math

import numpy as np
import pytest

from vqmoe_vision.comparison import statistics as stats


def test_paired_t_test_by_hand():
    row, reference = {1: 11.0, 2: 22.0, 3: 33.0, 4: 0.0}, {1: 10.0, 2: 20.0, 3: 30.0, 9: 0.0}
    found = stats.paired_difference(row, reference)
    # differences 1, 2, 3: mean 2, standard deviation 1, t = 2 sqrt(3) with two degrees of freedom,
    # whose distribution is 1/2 + t / (2 sqrt(2 + t^2)): p = 1 - sqrt(12 / 14); its 97.5 % point is
    # 0.95 sqrt(2 / (1 - 0.95^2)) = 4.30265
    assert found.each == {1: 1, 2: 2, 3: 3}
    assert (found.pairs, found.mean, found.std) == (3, pytest.approx(2), pytest.approx(1))
    assert found.p == pytest.approx(1 - math.sqrt(12 / 14))
    half = 0.95 * math.sqrt(2 / (1 - 0.95**2)) / math.sqrt(3)
    assert (found.low, found.high) == (pytest.approx(2 - half), pytest.approx(2 + half))


@pytest.mark.parametrize('row, pairs', [({}, 0), ({1: 3.0}, 1)])
def test_nothing_is_tested_below_two_pairs(row, pairs):
    found = stats.paired_difference(row, {1: 2.0, 2: 5.0})
    assert found.pairs == pairs
    assert all(math.isnan(value) for value in (found.std, found.low, found.high, found.p))


def test_equal_differences_have_no_p():
    found = stats.paired_difference({1: 0.3, 2: 0.7}, {1: 0.1, 2: 0.5})  # 0.2 but for rounding
    assert (found.std, found.low, found.high) == (0, found.mean, found.mean)
    assert math.isnan(found.p)


def test_holm_by_hand():
    # 0.01 x 3, then 0.03 x 2, then 0.04 x 1, which may not fall below the second
    found = stats.holm({'a': 0.04, 'b': 0.01, 'c': 0.03}, 3)
    assert found == pytest.approx(dict(a=0.06, b=0.03, c=0.06))
    assert stats.holm({'a': 0.9, 'b': 0.8}, 2) == {'a': 1, 'b': 1}


def test_what_is_not_there_yet_counts_as_one():
    known = {'a': 0.02, 'b': 0.001}
    expected = stats.holm({**known, 'c': 1.0}, 3)
    assert expected['b'] == pytest.approx(0.003)
    assert stats.holm(known, 3) == {row: expected[row] for row in known}
    # nor does a p that is not defined make the others smaller
    found = stats.holm({'c': math.nan, **known}, 3)
    assert math.isnan(found.pop('c')) and found == {row: expected[row] for row in known}


SCREENED = {'b': {1: 12.0, 2: 20.0}, 'a': {2: 23.0, 1: 11.0}, 'ref': {1: 10.0, 2: 20.0}}


def test_noise_of_all_rows_by_hand():
    noise, freedom = stats.pooled_noise(SCREENED)
    # the means of seeds are 11 and 21: less them rows are 1 -1, 0 2, -1 -1; less their own means,
    # 0 1 -1, they are 1 -1, -1 1, 0 0: squares are 4, over (3 - 1)(2 - 1) they are 2, and a
    # difference of two rows has twice that variance
    assert (noise, freedom) == (pytest.approx(2), 2)
    found = stats.differences(SCREENED, 'ref')
    a = stats.with_noise(found['a'], noise, freedom)
    # a mean of 2 over 2 / sqrt(2) is t = sqrt(2), with the distribution of the first test
    assert a.p == pytest.approx(1 - math.sqrt(2) / 2)
    half = 0.95 * math.sqrt(2 / (1 - 0.95**2)) * math.sqrt(2)
    assert (a.low, a.high) == (pytest.approx(2 - half), pytest.approx(2 + half))
    assert (a.each, a.mean, a.std) == (found['a'].each, 2, pytest.approx(math.sqrt(2)))


def test_rows_that_lack_a_seed_or_repeat_another_tell_no_noise():
    more = {'early': {1: 99.0}, 'twin of b': SCREENED['b']}
    assert stats.pooled_noise({**SCREENED, **more}) == stats.pooled_noise(SCREENED)
    for scores in (more, {}):
        noise, freedom = stats.pooled_noise(scores)
        assert math.isnan(noise) and freedom == 0


def test_two_one_sided_tests_by_hand():
    # mean 2, deviation 1, three seeds: t = (5 - 2) sqrt(3) and (5 + 2) sqrt(3) with two degrees of
    # freedom; the larger p is that of the first, 1/2 - t / (2 sqrt(2 + t^2))
    found = stats.paired_difference({1: 1.0, 2: 2.0, 3: 3.0}, dict.fromkeys((1, 2, 3), 0.0))
    assert stats.equivalence(found, 5.0) == pytest.approx(0.5 - math.sqrt(27) / (2 * math.sqrt(29)))
    assert stats.equivalence(found, 1.0) > 0.5
    assert math.isnan(stats.equivalence(stats.paired_difference({1: 1.0}, {1: 0.0}), 5.0))


def test_noise_of_other_comparisons_counts_where_variances_agree():
    # SCREENED has squares of 4 over two degrees of freedom, and scores f times as large 4 f^2.
    # Of two and two degrees of freedom F has the distribution F / (1 + F): twice its upper tail
    # is 0.05 at F = 39, which lies between the squares of 6 and of 7
    larger = {
        f: {r: {n: f * x for n, x in of.items()} for r, of in SCREENED.items()} for f in (6, 7)
    }
    noise, freedom = stats.pooled_noise(SCREENED, [larger[6]])
    assert (noise, freedom) == (pytest.approx(math.sqrt(2 * (4 + 4 * 36) / 4)), 4)
    assert stats.pooled_noise(SCREENED, [larger[7]]) == stats.pooled_noise(SCREENED)
    assert stats.pooled_noise(larger[7], [SCREENED]) == stats.pooled_noise(larger[7])
    # what has no variance of its own has that of others
    assert stats.pooled_noise({}, [{}, SCREENED]) == stats.pooled_noise(SCREENED)


def test_a_mean_over_comparisons_by_hand():
    # Alike: there is no variance between, and the normal interval of equal variances stays.
    pooled = stats.together([1.0, 1.0], [0.5, 0.5])
    half = 1.95996 * 0.5
    assert (pooled.mean, pooled.heterogeneity) == (1, 0)
    assert (pooled.low, pooled.high) == pytest.approx((1 - half, 1 + half), abs=1e-4)
    assert (pooled.predicted_low, pooled.predicted_high) == (pooled.low, pooled.high)
    # Around the mean 3 with weights of 1 / 2, Q has three degrees of freedom, and the weights sum
    # to 2, their squares to 1.
    pooled = stats.together([-2.0, 0.0, 7.0, 7.0], [2.0, 2.0, 2.0, 2.0])
    chi_square = (25 + 9 + 16 + 16) / 2
    between = (chi_square - 3) / (2 - 1 / 2)
    # all weights are equal: the interval is that of Student's t for four numbers
    variance = (25 + 9 + 16 + 16) / 3 / 4
    half, further = (3.18245 * math.sqrt(of) for of in (variance, variance + between))
    assert pooled.mean == pytest.approx(3)
    assert (pooled.low, pooled.high) == pytest.approx((3 - half, 3 + half), abs=1e-4)
    assert pooled.predicted_high == pytest.approx(3 + further, abs=1e-4)
    assert pooled.heterogeneity == pytest.approx((chi_square - 3) / chi_square)


def test_differences_that_agree_by_chance_have_the_noise_of_others():
    found = stats.paired_difference({1: 12.0, 2: 22.0}, SCREENED['ref'])
    assert math.isnan(found.p)
    assert stats.with_noise(found, 2.0, 2).p == pytest.approx(1 - math.sqrt(0.5))
    for stays in (
        stats.paired_difference(SCREENED['ref'], SCREENED['ref']),  # one run under two names
        stats.paired_difference({1: 12.0}, SCREENED['ref']),
    ):
        assert stats.with_noise(stays, 2.0, 2) is stays
    assert stats.with_noise(found, math.nan, 0) is found


@pytest.mark.parametrize('effect, pairs', [(0.5, 34), (1.0, 10)])
def test_pairs_that_tables_of_power_give(effect, pairs):
    """Of the two-sided paired t-test at 5 % with 80 % power."""
    enough, fewer = (stats.detectable(2.0, n, n - 1) for n in (pairs, pairs - 1))
    assert enough <= 2.0 * effect < fewer


def test_an_interval_over_images_by_hand():
    a = {1: np.array([1, 1, 1, 0]), 2: np.array([1, 0, 1, 0]), 9: np.array([0, 0, 0, 0])}
    b = {1: np.array([0, 1, 1, 0]), 2: np.array([0, 0, 1, 1])}
    # differences of images, as means of two seeds: 1, 0, 0, -0.5; mean 12.5 %, deviation 0.6292
    half = 1.95996 * 62.92 / 2
    assert stats.over_images(a, b) == pytest.approx((12.5 - half, 12.5 + half), abs=0.01)
    assert all(map(math.isnan, stats.over_images(a, {3: b[1]})))
