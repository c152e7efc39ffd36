"""Types of arrays, resamplings and their intervals, ranks and correlations, for the whole package."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Doubles = NDArray[np.float64]
    Floats = NDArray[np.float32]
    Indices = NDArray[np.int64]
    Counts = NDArray[np.int64]
    IntArray = NDArray[np.int32]
    Bools = NDArray[np.bool_]

Interval = tuple[float, float]

N_BOOTSTRAP = 1000
CONFIDENCE = 0.95
INTERVAL = (2.5, 97.5)  # the percentiles that leave CONFIDENCE between them
Z_95 = 1.959963984540054
# A smaller share of the variance is a rounding error.
NOTHING_LEFT = 1e-12
# Up to 8! = 40,320 orders are tried one by one.
MAX_EXACT = 8


def resamples(n: int, seed: int, name: str, size: int = N_BOOTSTRAP) -> Doubles:
    """[size, n] number of times that each resampling draws each of n things, with replacement; it depends on `name`."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return _counts(rng, np.full(size, n), n)


def group_resamples(groups: IntArray, seed: int, name: str, size: int) -> Doubles:
    """[size, n] number of times that each resampling draws each of n things: first groups of them, then their members.

    groups: [n] the group of each; as many groups are drawn as there are, with replacement, and as many members of each.
        Those of a single group are drawn as `resamples` does.
    """
    if len(np.unique(groups)) == 1:
        return resamples(len(groups), seed, name, size)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    drawn = _counts(rng, np.full(size, len(members)), len(members)).astype(np.int64)
    counts = np.zeros((size, len(groups)))
    for of_group, here in zip(drawn.T, members, strict=True):
        counts[:, here] = _counts(rng, len(here) * of_group, len(here))
    return counts


def _counts(rng: np.random.Generator, n_draws: Indices, n: int) -> Doubles:
    """[len(n_draws), n] number of times that each of n things is drawn, with replacement, in so many draws.

    The things are drawn one by one, which takes a third of the time of multinomial counts.
    """
    at = np.repeat(np.arange(0, len(n_draws) * n, n), n_draws)
    at += rng.integers(n, size=len(at), dtype=np.int32)
    return np.bincount(at, minlength=len(n_draws) * n).reshape(len(n_draws), n).astype(np.float64)


def percentile_interval(values: Doubles) -> Interval:
    """95% interval of the values of resamplings."""
    low, high = np.percentile(values, INTERVAL)
    return float(low), float(high)


def mean_interval(values: Doubles, shares: Doubles) -> Interval:
    """95% interval of a mean over prompts.

    values: [n_prompts]
    shares: [n_resamples, n_prompts] share of each prompt in a resampling, `resamples` / n_prompts
    """
    # einsum adds in one order; a BLAS product would depend on the number of threads.
    return percentile_interval(np.einsum("rp,p->r", shares, values))


def ratio_interval(numerator: Doubles, denominator: Doubles, resamples: Doubles) -> Interval:
    """95% interval of sum(numerator) / sum(denominator).

    numerator, denominator: [n_prompts] sum over a prompt's tokens, and their number
    resamples: [n_resamples, n_prompts] number of times that each resampling drew each prompt

    Tokens of one prompt depend on each other, so whole prompts are drawn, numerator and denominator together.
    """
    totals = np.einsum("rp,p->r", resamples, denominator)
    ratios = np.einsum("rp,p->r", resamples, numerator)[totals > 0] / totals[totals > 0]
    return percentile_interval(ratios)


def grouped_ratio_interval(numerator: Doubles, denominator: Doubles, resamples: Doubles, groups: IntArray) -> Interval:
    """95% interval of sum(numerator) / sum(denominator) of prompts in a few groups, which might have been others.

    numerator, denominator, resamples: as for `ratio_interval`; numerators are positive
    groups: [n_prompts] the group of each prompt, such as the draw of demonstrations that it was asked behind

    ratio * exp(+-t s / ratio), where t is the quantile of Student's distribution with one degree of freedom less than
    there are groups, and s the error that the ratio's residuals of whole groups give (the cluster-robust one); it
    contains the prompts' own share. On the logarithm, because sums of squares are skewed. Never narrower than
    `ratio_interval`, which it is for a single group.
    """
    bounds = np.asarray(ratio_interval(numerator, denominator, resamples))[:, None]
    low, high = _widened(bounds, numerator[:, None], denominator, groups)[:, 0]
    return float(low), float(high)


def grouped_ratio_intervals(numerators: Doubles, denominator: Doubles, resamples: Doubles, groups: IntArray) -> Doubles:
    """[2, m] the same of each column of numerators [n_prompts, m], up to the rounding of a sum."""
    totals = resamples @ denominator
    drawn = resamples if totals.all() else resamples[totals > 0]
    ratios = numerators.T @ drawn.T  # a resampling beside the other, as they are sorted
    ratios /= totals[totals > 0]
    ratios.sort(axis=1)  # by vector instructions, where a percentile's partial sort takes several times as long
    at = np.asarray(INTERVAL) / 100 * (ratios.shape[1] - 1)
    below = np.floor(at).astype(np.int64)
    low, high = ratios[:, below], ratios[:, np.minimum(below + 1, ratios.shape[1] - 1)]
    return _widened((low + (at - below) * (high - low)).T, numerators, denominator, groups)


def _widened(bounds: Doubles, numerators: Doubles, denominator: Doubles, groups: IntArray) -> Doubles:
    """[2, m] intervals of prompts, widened by what other groups would change; numerators: [n_prompts, m]"""
    from scipy import special

    _, group_of = np.unique(groups, return_inverse=True)
    n_groups = int(group_of.max()) + 1
    ratios = numerators.sum(axis=0) / denominator.sum()
    some = ratios > 0
    if n_groups == 1 or not some.any():
        return bounds
    of_groups = np.zeros((n_groups, int(some.sum())))
    np.add.at(of_groups, group_of, numerators[:, some] / ratios[some] - denominator[:, None])
    relative_errors = np.sqrt(n_groups / (n_groups - 1) * ((of_groups / denominator.sum()) ** 2).sum(axis=0))
    factors = np.exp(float(special.stdtrit(n_groups - 1, (1 + CONFIDENCE) / 2)) * relative_errors)
    widened = bounds.copy()
    widened[0, some] = np.minimum(bounds[0, some], ratios[some] / factors)
    widened[1, some] = np.maximum(bounds[1, some], ratios[some] * factors)
    return widened


def mean_ranks(values: ArrayLike) -> Doubles:
    """Ranks from 1 along the last axis; ties get their mean rank."""
    from scipy import stats

    ranks: Doubles = stats.rankdata(values, axis=-1)
    return ranks


def pearson(x: Doubles, y: Doubles) -> Doubles:
    """Correlation along the last axis; NaN where x or y is constant."""
    dx, dy = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        r: Doubles = (dx * dy).sum(-1) / np.sqrt((dx * dx).sum(-1) * (dy * dy).sum(-1))
    return np.where((np.ptp(x, -1) == 0) | (np.ptp(y, -1) == 0), np.nan, np.clip(r, -1, 1))


def spearman(x: ArrayLike, y: ArrayLike) -> Doubles:
    """Correlation of the ranks along the last axis; NaN where x or y is constant."""
    return pearson(mean_ranks(x), mean_ranks(y))


def partial_pearson(x: Doubles, y: Doubles, given: Doubles) -> Doubles:
    """Partial correlation of x and y along the last axis: the correlation of their residuals on `given`.

    (r_xy - r_xz r_yz) / sqrt((1 - r_xz^2) (1 - r_yz^2)), with z = given; NaN where x, y or z is constant, or z
    determines x or y
    """
    r, of_x, of_y = pearson(x, y), pearson(x, given), pearson(y, given)
    unexplained = (1 - of_x**2) * (1 - of_y**2)
    with np.errstate(invalid="ignore", divide="ignore"):
        partial: Doubles = np.clip((r - of_x * of_y) / np.sqrt(unexplained), -1, 1)
    return np.where(unexplained < NOTHING_LEFT, np.nan, partial)


def partial_spearman(x: ArrayLike, y: ArrayLike, given: ArrayLike) -> Doubles:
    """Partial correlation of the ranks along the last axis; NaN as for `partial_pearson`."""
    return partial_pearson(mean_ranks(x), mean_ranks(y), mean_ranks(given))


def defined(r: Doubles) -> float | None:
    """One correlation as a number; None for NaN."""
    return None if np.isnan(r) else float(r)


def chance_of_agreement(rho: float, x: Sequence[float], y: Sequence[float]) -> float:
    """Share of all orders whose |Spearman| is at least |rho|, that of x and y: exact up to eight, else normal."""
    from scipy import stats

    if len(x) > MAX_EXACT:
        return math.erfc(abs(rho) * math.sqrt((len(x) - 1) / 2))
    a, b = (ranks - ranks.mean() for ranks in (mean_ranks(x), mean_ranks(y)))  # multiples of 1/2, whose sums are exact
    test = stats.permutation_test(
        (a,), lambda order, axis: np.abs((order * b).sum(axis)),
        permutation_type="pairings", alternative="greater", n_resamples=np.inf, vectorized=True,
    )  # fmt: skip
    return float(test.pvalue)
