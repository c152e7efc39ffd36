"""Association of scores and changes, and limits of the outcomes as evidence; statistics run along the last axis."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sts_fast.errors import InputError
from sts_fast.outcomes.outcomes import Outcome, Outcomes
from sts_fast.outcomes.validate.reading import control_array, outcome_arrays
from sts_fast.outcomes.validate.record import Association, Estimate, GivenText, Limits, Partial
from sts_fast.statistics import (
    INTERVAL,
    MAX_EXACT,
    Z_95,
    Interval,
    defined,
    mean_ranks,
    partial_pearson,
    partial_spearman,
    pearson,
    spearman,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sts_fast.statistics import Doubles, Indices

    Statistic = Callable[[Doubles, Doubles], Doubles]

N_DRAWS = 10_000
LEVEL = 0.05
# The r of a good forecast: the paper reports .60 to .90.
GOOD = 0.7


def outcome_limits(outcomes: Outcomes | Mapping[str, Outcome], *, seed: int = 0) -> Limits:
    """Limits of these outcomes as evidence about any forecast. Raises InputError for fewer than four domains."""
    domains = outcomes.domains if isinstance(outcomes, Outcomes) else outcomes
    change, stderr = outcome_arrays(domains)
    size, n = np.abs(change), len(change)
    if np.ptp(size) == 0:
        raise InputError(f"the change of all {n} domains is of the same size: nothing can be compared")
    noise_known = bool(np.isfinite(stderr).all())
    rng = np.random.default_rng([seed, 1])
    noisy = np.abs(change + rng.standard_normal((N_DRAWS, n)) * np.nan_to_num(stderr))
    reached = pearson(size, noisy)
    critical = critical_r(n)
    standardised = (size - size.mean()) / size.std()
    good = GOOD * standardised + math.sqrt(1 - GOOD**2) * rng.standard_normal((N_DRAWS, n))
    orders, _ = _orders(n, seed)
    rankings = pearson(np.arange(1.0, n + 1)[orders], size)
    return Limits(
        n_distinguishable=int((size > Z_95 * stderr).sum()) if noise_known else None,
        reliability=_reliability(change, stderr) if noise_known else None,
        ceiling=float(np.nanmedian(reached)) if noise_known else None,
        ceiling_ci=_percentiles(reached) if noise_known else None,
        power=float(np.mean(pearson(good, noisy) > critical)),
        critical_r=critical,
        chance_above_good=1 - float(np.interp(GOOD, *_random_pearson(n))),
        chance_ranking_above_good=float(np.mean(rankings > GOOD)),
    )


def sign_auc(score: Doubles, change: Doubles) -> float | None:
    risen, fallen = score[change > 0][:, None], score[change < 0]
    if not risen.size or not fallen.size:
        return None
    return float(np.mean(risen > fallen) + np.mean(risen == fallen) / 2)


@dataclass(frozen=True)
class Draws:
    """Random numbers shared by all predictors, so that these are compared on the same draws.

    outcome_noise, score_noise: [N_DRAWS, n] standard normal
    domains: [N_DRAWS, n] domains drawn with replacement
    orders:  [n_orders, n] permutations: all of them where exact, else random ones
    """

    outcome_noise: Doubles
    score_noise: Doubles
    domains: Indices
    orders: Indices
    exact: bool

    @classmethod
    def make(cls, n: int, seed: int) -> Draws:
        rng = np.random.default_rng([seed, 0])
        outcome_noise, score_noise = rng.standard_normal((2, N_DRAWS, n))
        domains = rng.integers(0, n, (N_DRAWS, n))
        return cls(outcome_noise, score_noise, domains, *_orders(n, seed))


def _orders(n: int, seed: int) -> tuple[Indices, bool]:
    if n <= MAX_EXACT:
        return np.asarray(list(itertools.permutations(range(n)))), True
    rng = np.random.default_rng([seed, 2])
    return rng.permuted(np.tile(np.arange(n), (N_DRAWS, 1)), axis=1), False


def associate(
    score: Doubles, score_sd: Doubles, change: Doubles, stderr: Doubles, target: Callable[[Doubles], Doubles],
    draws: Draws,
) -> Association | None:  # fmt: skip
    """Scores against target(change); None where either is the same in all domains."""
    aim = target(change)
    if np.ptp(score) == 0 or np.ptp(aim) == 0:
        return None
    again = _measured_again(score, score_sd, change, stderr, target, draws)
    estimates = []
    ranks, aim_ranks = mean_ranks(score), mean_ranks(aim)
    resampled = score[draws.domains], aim[draws.domains]
    variants: list[tuple[Statistic, Doubles, Doubles]] = [
        (pearson, score, aim), (spearman, ranks, aim_ranks), (_r_squared, score, aim),
    ]  # fmt: skip
    for statistic, x, y in variants:
        value = float(statistic(x, y))
        # Ranks of ranks are the same ranks, so permuting them saves ranking again.
        permuted = (pearson if statistic is spearman else statistic)(x[draws.orders], y)
        estimates.append(
            Estimate(
                value=value,
                ci=None if again is None else _percentiles(statistic(*again)),
                ci_domains=_percentiles(statistic(*resampled)),
                leave_one_out=_leave_one_out(statistic, x, y),
                p_one_sided=_share(permuted >= value - 1e-12, draws.exact),
                p_two_sided=_share(np.abs(permuted) >= abs(value) - 1e-12, draws.exact),
            )
        )
    return Association(*estimates)


def associate_control(
    values: Mapping[str, Any], names: Sequence[str], change: Doubles, stderr: Doubles, draws: Draws
) -> Association | None:
    """As associate; None also where the control is missing for a domain."""
    numbers = control_array(values, names)
    return None if numbers is None else associate(numbers, np.zeros(len(names)), change, stderr, np.abs, draws)


def given_text(
    score: Doubles, score_sd: Doubles, change: Doubles, stderr: Doubles, target: Callable[[Doubles], Doubles],
    texts: Mapping[str, Doubles], draws: Draws,
) -> GivenText | None:  # fmt: skip
    """Scores against target(change), given the best of the controls that are made from texts alone.

    texts: by control, its number in every domain

    None where no control varies.
    """
    aim = target(change)
    r_of = {name: r for name, values in texts.items() if (r := defined(pearson(values, aim))) is not None}
    if not r_of:
        return None
    best = max(r_of, key=lambda name: abs(r_of[name]))
    z, again = texts[best], _measured_again(score, score_sd, change, stderr, target, draws)

    def partial(statistic: Callable[[Doubles, Doubles, Doubles], Doubles]) -> Partial | None:
        value = defined(statistic(score, aim, z))
        if value is None:
            return None
        of_domains = statistic(score[draws.domains], aim[draws.domains], z[draws.domains])
        return Partial(value, None if again is None else _percentiles(statistic(*again, z)), _percentiles(of_domains))

    return GivenText(best, r_of[best], partial(partial_pearson), partial(partial_spearman))


def _measured_again(
    score: Doubles, score_sd: Doubles, change: Doubles, stderr: Doubles, target: Callable[[Doubles], Doubles],
    draws: Draws,
) -> tuple[Doubles, Doubles] | None:  # fmt: skip
    """[N_DRAWS, n] scores and target(change) with new noise; None where neither noise is known."""
    if not score_sd.any() and not np.isfinite(stderr).any():
        return None
    return score + draws.score_noise * score_sd, target(change + draws.outcome_noise * np.nan_to_num(stderr))


def _r_squared(x: Doubles, y: Doubles) -> Doubles:
    return pearson(x, y) ** 2


def _leave_one_out(statistic: Statistic, x: Doubles, y: Doubles) -> Interval:
    left = _without_each(statistic, x, y)
    return float(np.nanmin(left)), float(np.nanmax(left))


def _without_each(statistic: Statistic, x: Doubles, y: Doubles) -> Doubles:
    """[n] the statistic without domain i; the value of all domains where it is not defined."""
    n = len(x)
    others = np.nonzero(~np.eye(n, dtype=bool))[1].reshape(n, n - 1)
    left = statistic(x[others], y[others])
    return np.where(np.isnan(left), statistic(x, y), left)


def without_most_helpful(score: Doubles, size: Doubles) -> tuple[int, float]:
    left = _without_each(pearson, score, size)
    return int(np.argmin(left)), float(left.min())


def _percentiles(values: Doubles) -> Interval | None:
    if np.isnan(values).all():
        return None
    low, high = np.nanpercentile(values, INTERVAL)
    return float(low), float(high)


def _share(hits: NDArray[np.bool_], exact: bool) -> float:
    """Share of all orders; or of random orders and the observed one, which is never zero."""
    return float(hits.mean()) if exact else float((hits.sum() + 1) / (len(hits) + 1))


def _random_pearson(n: int) -> tuple[Doubles, Doubles]:
    """Distribution of r of n independent normal scores with anything: grid of r, and P(random r <= r).

    Its density is proportional to (1 - r^2)^((n - 4) / 2), that is cos(a)^(n - 3) in a = arcsin r.
    """
    angle = np.linspace(-np.pi / 2, np.pi / 2, 20_001)
    density = np.clip(np.cos(angle), 0, None) ** (n - 3)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return np.sin(angle), below / below[-1]


def critical_r(n: int) -> float:
    r, below = _random_pearson(n)
    return float(np.interp(1 - LEVEL, below, r))


def _reliability(change: Doubles, stderr: Doubles) -> float:
    """1 - mean_i Var|X_i| / Var(|d|), X_i ~ N(d_i, stderr_i^2), whose |X_i| is folded normal."""
    from scipy import stats

    size, noisy = np.abs(change), stderr > 0
    noise = stats.foldnorm.var(size[noisy] / stderr[noisy], scale=stderr[noisy])
    return max(0.0, 1 - float(noise.sum()) / len(size) / float(np.var(size, ddof=1)))
