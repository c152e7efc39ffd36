"""Parts of a comparison of forecast and outcome."""

from __future__ import annotations

from dataclasses import dataclass

from sts_fast.outcomes.outcomes import Outcome
from sts_fast.statistics import Interval


@dataclass(frozen=True)
class Estimate:
    """One statistic of the scores s and the changes, over the matched domains.

    value:       as observed
    ci:          95% interval for measuring the same domains again: percentiles of 10,000 draws of the outcomes,
                 N(change, stderr^2), and the scores, N(score, ((high - low) / 3.92)^2) from their own interval. The
                 observed values contain noise already and get it once more, so the interval lies lower than the
                 value. None where neither noise is known.
    ci_domains:  95% interval for choosing other domains of the same kind: the domains are drawn with replacement, each
                 with its observed score and change. Their noise comes with the domain and is not added a second time.
                 With 8 to 14 domains such an interval covers the truth in about 90% of cases instead of 95%.
    leave_one_out: lowest and highest value with one domain left out
    p_one_sided: share of all orders of the scores with a value at least as large, as random forecasts reach it
    p_two_sided: share with a value at least as far from zero
    """

    value: float
    ci: Interval | None
    ci_domains: Interval | None
    leave_one_out: Interval
    p_one_sided: float
    p_two_sided: float


@dataclass(frozen=True)
class Association:
    """Association of scores and changes.

    pearson:   sum (s - mean s)(t - mean t) / sqrt(sum (s - mean s)^2 sum (t - mean t)^2)
    spearman:  the same of the ranks, ties ranked by their mean
    r_squared: pearson^2, the share of the variance of t that a straight line in s explains
    """

    pearson: Estimate
    spearman: Estimate
    r_squared: Estimate


@dataclass(frozen=True)
class Partial:
    """A partial correlation, with the intervals of Estimate; the given variable counts as known exactly."""

    value: float
    ci: Interval | None
    ci_domains: Interval | None


@dataclass(frozen=True)
class GivenText:
    """Association of scores and changes, given the text of the questions.

    control: of the controls that need no model, the one with the largest |r| with the changes; r: that correlation
    pearson, spearman: partial correlation of scores and changes, given it; None where it determines one of them
    """

    control: str
    r: float
    pearson: Partial | None
    spearman: Partial | None


@dataclass(frozen=True)
class Limits:
    """Limits of these outcomes as evidence about any forecast, at best: observed changes d are taken as the true ones.

    n_distinguishable: changes with |d| > 1.96 stderr
    reliability: 1 - mean_i Var|N(d_i, stderr_i^2)| / Var(|d|): the share of the variance of |change| over domains that
                 is not noise of the evaluation (0 where noise alone would give the spread). Its root is the r with
                 the observed |change| of a forecast that knows every true one.
    ceiling, ceiling_ci: median and 95% range of pearson(|d|, |d + noise|), noise ~ N(0, stderr^2): what a forecast
                 equal to the observed |change| reaches when they are measured again
    power:       chance that a forecast whose true r with |change| is .7 stands out from random ones at 5%, one-sided
    critical_r:  the r that 5% of random forecasts exceed
    chance_above_good: chance that a random forecast (independent normal scores) exceeds r = .7: the t test's
                 P(r > .7), which depends on the number of domains only
    chance_ranking_above_good: the same for a random ranking, 1 to n in any order, against these outcomes

    Fields that need standard errors are None where one of them is not known; power is then that of noiseless outcomes.
    """

    n_distinguishable: int | None
    reliability: float | None
    ceiling: float | None
    ceiling_ci: Interval | None
    power: float
    critical_r: float
    chance_above_good: float
    chance_ranking_above_good: float


@dataclass(frozen=True)
class DomainResult:
    """Score and change of one domain. z = change / stderr; None where stderr is unknown or zero."""

    name: str
    score: float
    score_ci: Interval | None
    z: float | None
    outcome: Outcome
