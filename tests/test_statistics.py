"""Statistics against scipy and cases written by hand."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest
from scipy import stats

from sts_fast import statistics
from sts_fast.statistics import (
    chance_of_agreement,
    defined,
    group_resamples,
    grouped_ratio_interval,
    mean_interval,
    mean_ranks,
    partial_pearson,
    partial_spearman,
    pearson,
    percentile_interval,
    ratio_interval,
    resamples,
    spearman,
)


def test_resamples_draw_with_replacement_by_seed_and_name() -> None:
    drawn = resamples(7, 3, "law")
    rng = np.random.default_rng([3, zlib.crc32(b"law")])
    expected = [np.bincount(rng.integers(7, size=7, dtype=np.int32), minlength=7) for _ in range(1000)]
    assert drawn.dtype == np.float64
    assert drawn.var(axis=0) == pytest.approx(6 / 7, rel=0.2)  # of a binomial count
    assert (drawn == expected).all()
    assert (drawn.sum(axis=1) == 7).all()
    for other in (resamples(7, 4, "law"), resamples(7, 3, "art")):
        assert (other != drawn).any()
    assert resamples(5, 0, "x", 32).shape == (32, 5)


def test_interval_of_a_mean_is_that_of_prompts_drawn_one_by_one() -> None:
    values, drawn = np.random.default_rng(0).normal(size=12), resamples(12, 1, "law", 50)
    means = [np.mean(np.repeat(values, counts.astype(int))) for counts in drawn]
    assert mean_interval(values, drawn / 12) == pytest.approx(np.percentile(means, [2.5, 97.5]), rel=1e-12)


def test_interval_of_a_mean_is_near_that_of_scipy() -> None:
    values = np.random.default_rng(0).gamma(2, size=200)
    found = stats.bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1))
    interval = found.confidence_interval
    assert mean_interval(values, resamples(200, 0, "x") / 200) == pytest.approx((interval.low, interval.high), rel=0.03)


def test_interval_of_a_ratio_leaves_out_resamplings_without_tokens() -> None:
    # By hand: of the four resamplings one drew no token; the others give 1/2, 3/2 and 1, so the middle 95% of
    # (1/2, 1, 3/2) is 1/2 + .05 / 2 to 3/2 - .05 / 2.
    numerator, denominator = np.asarray([1.0, 3, 0]), np.asarray([2.0, 2, 0])
    drawn = np.asarray([[3.0, 0, 0], [0, 3, 0], [1, 1, 1], [0, 0, 3]])
    assert ratio_interval(numerator, denominator, drawn) == pytest.approx((0.525, 1.475), rel=1e-12)


def test_groups_are_drawn_first_and_then_their_members() -> None:
    groups = np.asarray([0, 1, 0, 1, 1, 2, 2], np.int32)
    drawn = group_resamples(groups, 3, "law", 4000)
    sizes = np.asarray([2, 3, 2])
    of_groups = np.stack([drawn[:, groups == g].sum(axis=1) for g in range(3)], axis=1) / sizes
    assert (of_groups == of_groups.astype(int)).all()
    assert (of_groups.sum(axis=1) == 3).all()
    # Multinomial: the mean is 1, the variance of a group's count 1 - 1/3.
    np.testing.assert_allclose(of_groups.var(axis=0), 2 / 3, atol=0.05)
    np.testing.assert_allclose(drawn.mean(axis=0), 1, atol=0.06)
    assert (group_resamples(np.zeros(5, np.int32), 3, "law", 8) == resamples(5, 3, "law", 8)).all()


def test_interval_of_a_ratio_over_groups_by_hand() -> None:
    # R = 16 / 4 = 4. Residuals of the groups: (2 + 4) - 4 * 2 = -2, and (4 + 6) - 4 * 2 = 2. The relative error is
    # sqrt(2 * (4 + 4)) / 16 = .25, and t of one degree of freedom 12.7062.
    numerator, denominator = np.asarray([2.0, 4, 4, 6]), np.ones(4)
    drawn = np.ones((3, 4))
    found = grouped_ratio_interval(numerator, denominator, drawn, np.asarray([0, 0, 1, 1], np.int32))
    factor = np.exp(12.706204736 * 0.25)
    assert found == pytest.approx((4 / factor, 4 * factor), rel=1e-9)


def test_interval_over_groups_is_never_narrower_than_that_over_prompts() -> None:
    numerator, denominator = np.asarray([1.0, 7, 1, 7]), np.ones(4)  # groups alike, prompts not
    drawn = resamples(4, 0, "law")
    of_prompts = ratio_interval(numerator, denominator, drawn)
    assert grouped_ratio_interval(numerator, denominator, drawn, np.asarray([0, 0, 1, 1], np.int32)) == of_prompts
    assert grouped_ratio_interval(numerator, denominator, drawn, np.zeros(4, np.int32)) == of_prompts
    assert grouped_ratio_interval(numerator * 0, denominator, drawn, np.asarray([0, 0, 1, 1], np.int32)) == (0, 0)


@pytest.mark.parametrize("between", [0.0, 0.3, 0.6])
def test_interval_over_groups_covers_the_mean_of_other_groups(between: float) -> None:
    """Five groups of six prompts, lognormal between groups and within: nominally 95%."""
    rng = np.random.default_rng(5)
    group_of = np.repeat(np.arange(5, dtype=np.int32), 6)
    drawn = resamples(30, 0, "law", 200)
    covered, alone = 0, 0
    for _ in range(300):
        of_groups = np.exp(between * rng.standard_normal(5) - between**2 / 2)[group_of]
        n_pairs = rng.integers(20, 80, 30).astype(float)
        sums = n_pairs * of_groups * np.exp(0.5 * rng.standard_normal(30) - 0.125)
        low, high = grouped_ratio_interval(sums, n_pairs, drawn, group_of)
        covered += low <= 1 <= high
        low, high = ratio_interval(sums, n_pairs, drawn)
        alone += low <= 1 <= high
    assert covered >= 0.9 * 300
    assert alone < covered
    assert between < 0.5 or alone < 0.75 * 300  # that over prompts says nothing of the choice of groups


def test_percentages_and_the_normal_quantile_are_those_of_95_percent() -> None:
    outside = 50 * (1 - statistics.CONFIDENCE)
    np.testing.assert_allclose(statistics.INTERVAL, (outside, 100 - outside), rtol=1e-14)
    assert stats.norm.ppf(0.975) == statistics.Z_95
    assert percentile_interval(np.arange(41.0)) == pytest.approx((1.0, 39.0))


def test_ties_get_their_mean_rank() -> None:
    # By hand: the two 5s hold the places 2 and 3.
    assert mean_ranks([5, 7, 5, 1]).tolist() == [2.5, 4, 2.5, 1]
    assert mean_ranks([[2, 2], [9, 8]]).tolist() == [[1.5, 1.5], [2, 1]]


@pytest.mark.parametrize(("ours", "theirs"), [(pearson, stats.pearsonr), (spearman, stats.spearmanr)])
def test_correlations_along_the_last_axis_equal_scipy(ours: Any, theirs: Any) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 6, (20, 9)).astype(float), rng.normal(size=(20, 9))
    expected = [theirs(a, b).statistic for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(ours(x, y), expected, rtol=1e-12, atol=1e-15)
    assert defined(ours(x[0], x[0])) == pytest.approx(1.0, abs=1e-15)


def test_what_is_constant_correlates_with_nothing() -> None:
    constant, other = np.full(5, 0.1), np.arange(5.0)
    assert defined(pearson(constant, other)) is None
    assert defined(spearman(other, constant)) is None
    assert np.isnan(pearson(np.stack([other, constant]), other)).tolist() == [False, True]


def partial_of(x: Any, y: Any, z: Any) -> float:
    """Both regressed on z with a constant by least squares, and the residuals correlated."""
    A = np.stack([np.ones(len(z)), z], axis=1)
    left = [values - A @ np.linalg.lstsq(A, values, rcond=None)[0] for values in (x, y)]
    return float(stats.pearsonr(*left).statistic)


def test_partial_correlations_are_those_of_residuals() -> None:
    rng = np.random.default_rng(0)
    z = rng.integers(0, 5, (30, 8)) + 100.0
    x, y = 3 * z + rng.normal(size=z.shape), rng.integers(0, 4, z.shape) - z
    expected = [partial_of(*three) for three in zip(x, y, z, strict=True)]
    np.testing.assert_allclose(partial_pearson(x, y, z), expected, rtol=1e-9, atol=1e-12)
    ranked = [partial_of(*map(stats.rankdata, three)) for three in zip(x, y, z, strict=True)]
    np.testing.assert_allclose(partial_spearman(x, y, z), ranked, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(partial_pearson(x, y[0], z[0]), [partial_of(one, y[0], z[0]) for one in x], rtol=1e-9)


def test_nothing_is_left_of_what_the_given_determines() -> None:
    x, y = np.asarray([1.0, 2, 4, 3, 7]), np.asarray([2.0, 1, 1, 5, 3])
    assert defined(partial_pearson(x, y, 0.3 * x - 7)) is None
    assert defined(partial_pearson(x, y, y)) is None
    assert defined(partial_pearson(x, y, np.full(5, 0.1))) is None
    assert defined(partial_spearman(x, y, x**3)) is None
    # By hand: z of no correlation with x leaves r_xy / sqrt(1 - r_yz^2).
    x, y, z = np.asarray([1.0, -1, 1, -1]), np.asarray([3.0, 0, 0, -1]), np.asarray([1.0, 1, -1, -1])
    r_xy, r_yz = (float(stats.pearsonr(one, y).statistic) for one in (x, z))
    assert partial_pearson(x, y, z) == pytest.approx(r_xy / (1 - r_yz**2) ** 0.5, rel=1e-12)


@pytest.mark.parametrize("n", [4, 6])
def test_chance_of_agreement_is_the_exact_permutation_p(n: int) -> None:
    rng = np.random.default_rng(n)
    x, y = rng.integers(0, 4, n).astype(float), rng.normal(size=n)
    x[0] += 10

    def statistic(order: Any) -> float:
        return float(stats.spearmanr(order, y).statistic)

    rho = defined(spearman(x, y))
    assert rho == pytest.approx(statistic(x))
    exact = stats.permutation_test((x,), statistic, permutation_type="pairings", n_resamples=np.inf)
    assert chance_of_agreement(rho or 0.0, x.tolist(), y.tolist()) == pytest.approx(exact.pvalue, abs=1e-12)


def test_chance_of_agreement_counts_every_order_as_good() -> None:
    # By hand: of the 24 orders of four, only the same and the reverse reach |rho| = 1, and all of them reach 0.
    assert chance_of_agreement(1.0, [1, 2, 3, 4], [1, 2, 3, 4]) == pytest.approx(2 / 24)
    assert chance_of_agreement(0.0, [2, 4, 1, 3], [1, 2, 3, 4]) == 1.0


def test_chance_of_agreement_of_many_domains_is_near_that_of_scipy() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=40), rng.normal(size=40)
    found = stats.spearmanr(x, y)
    assert chance_of_agreement(found.statistic, x.tolist(), y.tolist()) == pytest.approx(found.pvalue, abs=0.02)
