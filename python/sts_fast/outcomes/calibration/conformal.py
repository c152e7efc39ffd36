"""Fits forecasts of the change with prediction intervals, from scores and changes of past trainings.

The line     change = intercept + slope * score, by least squares, with the same weight for every training set. For
             signed scores it goes through the origin. Scores without a sign forecast |change|, with intercept and
             slope >= 0.
The scale    sigma(s) = floor + per_score * |s|, the same fit of the absolute residuals: larger forecasts can have
             larger errors.
The interval line(s) +- multiplier * sigma(s). The multiplier comes from residuals r = |change - line(s)| / sigma(s)
             whose line and scale were fitted without their own training set (cross-conformal prediction, Vovk 2015;
             Barber et al. 2021, with whole training sets left out).

Domains of one training move together, so only training sets are exchangeable, not domains. One domain drawn from
each of K training sets, and one from the next, are exchangeable: the m-th smallest of the K residuals, with
m = ceil(level (K + 1)), covers the next with probability m / (K + 1) (Dunn, Wasserman and Ramdas 2022, subsampling
once). The multiplier avoids the random draw: the share of residuals below it, averaged over training sets, is the share
below that m-th smallest, averaged over all draws; this average has a closed form (a Poisson-binomial sum). With one
domain per training set the multiplier is the m-th smallest itself, with training sets all alike the m / (K + 1)
quantile. The probability is exact only for the drawn residual; simulations in the tests check the multiplier.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from sts_fast.statistics import Bools, Doubles, Indices

    Lines = Callable[["Points"], "Line"]

LEVEL = 0.9
# Distinct residuals that the multiplier is chosen from.
MOST_CANDIDATES = 4096


@dataclass(frozen=True)
class Points:
    """Scores and changes of past trainings; a point is one domain of one training.

    score, change: [n]; change is |change| where the scores have no sign
    train:         [n] number of the training set, from 0; trainings on the same set share it
    signed:        whether scores have a sign
    """

    score: Doubles
    change: Doubles
    train: Indices
    signed: bool

    def only(self, kept: Bools) -> Points:
        return Points(self.score[kept], self.change[kept], self.train[kept], self.signed)

    def weights(self) -> Doubles:
        """[n] weights that sum to 1, the same total for each training set."""
        _, of, counts = np.unique(self.train, return_inverse=True, return_counts=True)
        return np.asarray(1 / (counts[of] * len(counts)))


@dataclass(frozen=True)
class Line:
    """The change forecast for a score, and its scale: the unit of the interval's half width."""

    intercept: float
    slope: float
    floor: float
    per_score: float

    def change(self, score: Doubles) -> Doubles:
        return self.intercept + self.slope * score

    def scale(self, score: Doubles) -> Doubles:
        return self.floor + self.per_score * np.abs(score)


@dataclass(frozen=True)
class Assessment:
    """Intervals for each training set from all others, beside those of a constant: the mean change, whatever the score.

    coverage:       share of the changes inside, each training set weighing the same; range: of single sets
    width:          mean width
    interval_score: mean of width + 2 / (1 - level) * distance outside (Gneiting and Raftery 2007): small is good
    error:          mean |change - forecast|
    constant_*:     the same of the constant
    """

    coverage: float
    coverage_range: tuple[float, float]
    width: float
    interval_score: float
    error: float
    constant_coverage: float
    constant_width: float
    constant_interval_score: float
    constant_error: float


def trains_needed(level: float = LEVEL) -> int:
    """The fewest training sets that an interval can be learned from: ceil(level (K + 1)) must not exceed K."""
    return math.ceil(level / (1 - level) - 1e-9)


def fit_line(points: Points) -> Line:
    """The line and its scale; see the head of this file."""
    weight = points.weights()
    if points.signed:
        squares = float((weight * points.score**2).sum())
        slope = float((weight * points.score * points.change).sum()) / squares if squares else 0.0
        intercept = 0.0
    else:
        intercept, slope = _nonnegative_line(points.score, points.change, weight)
    residual = np.abs(points.change - intercept - slope * points.score)
    floor, per_score = _nonnegative_line(np.abs(points.score), residual, weight)
    return Line(intercept, slope, _positive(floor, residual, weight), per_score)


def fit_constant(points: Points) -> Line:
    """The mean change for every score, which a forecast has to beat."""
    weight = points.weights()
    mean = float((weight * points.change).sum())
    residual = np.abs(points.change - mean)
    return Line(mean, 0.0, _positive(float((weight * residual).sum()), residual, weight), 0.0)


def _positive(floor: float, residual: Doubles, weight: Doubles) -> float:
    return max(floor, 1e-3 * float((weight * residual).sum()), float(np.finfo(np.float64).tiny))


def _nonnegative_line(x: Doubles, y: Doubles, weight: Doubles) -> tuple[float, float]:
    """Weighted least squares of y >= 0 on x >= 0 with an intercept and a slope that are not negative."""
    mean_x, mean_y = float((weight * x).sum()), float((weight * y).sum())
    spread = float((weight * (x - mean_x) ** 2).sum())
    slope = float((weight * (x - mean_x) * (y - mean_y)).sum()) / spread if spread else 0.0
    if slope <= 0:
        return mean_y, 0.0
    if slope * mean_x > mean_y:
        return 0.0, float((weight * x * y).sum() / (weight * x * x).sum())
    return mean_y - slope * mean_x, slope


def held_out_residuals(points: Points, fit: Lines = fit_line) -> Doubles:
    """[n] |change - line| / scale, both fitted without the point's own training set."""
    residuals = np.empty(len(points.score))
    for train in np.unique(points.train):
        own = points.train == train
        line = fit(points.only(~own))
        residuals[own] = np.abs(points.change[own] - line.change(points.score[own])) / line.scale(points.score[own])
    return residuals


def multiplier(residuals: Doubles, train: Indices, level: float = LEVEL) -> float:
    """The half width, in units of the scale, that holds a new training set's change with probability `level`.

    residuals: [n] of held_out_residuals; train: [n] their training sets, K of them

    Raises ValueError where K < trains_needed(level).
    """
    sets = [np.sort(residuals[train == number]) for number in np.unique(train)]
    n_sets = len(sets)
    rank = math.ceil(level * (n_sets + 1) - 1e-9)
    if rank > n_sets:
        raise ValueError(f"{trains_needed(level)} training sets are needed, not {n_sets}")
    values = np.unique(residuals)
    if len(values) > MOST_CANDIDATES:
        values = values[np.linspace(0, len(values) - 1, MOST_CANDIDATES).astype(np.int64)]
    # [n_values, n_sets] share of each training set's residuals that do not exceed each value.
    shares = np.stack([np.searchsorted(own, values, side="right") / len(own) for own in sets], axis=1)
    # [n_values, n_sets + 1] P(so many of the drawn residuals do not exceed the value).
    drawn = np.zeros((len(values), n_sets + 1))
    drawn[:, 0] = 1
    for share in shares.T[:, :, None]:
        drawn[:, 1:] = drawn[:, 1:] * (1 - share) + drawn[:, :-1] * share
        drawn[:, :1] *= 1 - share
    at_most = drawn[:, rank:].sum(axis=1)  # P(the rank-th smallest does not exceed the value)
    share = shares.mean(axis=1)
    inside = float((np.diff(at_most, prepend=0.0) * share).sum())
    return float(values[min(int(np.searchsorted(share, inside - 1e-12)), len(values) - 1)])


def judge(past: Points, new: Points, fit: Lines = fit_line, level: float = LEVEL) -> tuple[float, float, float, float]:
    """Coverage, mean width, interval score and error (see Assessment) on points whose training sets are not in past."""
    line = fit(past)
    half = multiplier(held_out_residuals(past, fit), past.train, level) * line.scale(new.score)
    off = np.abs(new.change - line.change(new.score))
    missed = 2 / (1 - level) * np.maximum(off - half, 0)
    return float(np.mean(off <= half)), float(2 * half.mean()), float((2 * half + missed).mean()), float(off.mean())


def assess(points: Points, level: float = LEVEL) -> Assessment | None:
    """Quality of the intervals on held-out training sets; None where too few would be left."""
    trains = np.unique(points.train)
    if len(trains) - 1 < trains_needed(level):
        return None
    held_out = [(points.only(points.train != train), points.only(points.train == train)) for train in trains]
    by_line = np.asarray([judge(past, new, fit_line, level) for past, new in held_out])
    by_constant = np.asarray([judge(past, new, fit_constant, level) for past, new in held_out])
    coverage, *figures = by_line.mean(axis=0).tolist()
    spread = float(by_line[:, 0].min()), float(by_line[:, 0].max())
    return Assessment(coverage, spread, *figures, *by_constant.mean(axis=0).tolist())
