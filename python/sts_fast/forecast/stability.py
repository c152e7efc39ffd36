"""Stability of a forecast, and the number of prompts that would settle it: a hint that stops nothing.

Both rules rest on one fact: the error of a mean over n prompts falls as 1 / sqrt(n).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

# A set of features is settled when resampling the prompts keeps this share of it. A ranking is settled when this share
# of the pairs of domains differ by more than chance would explain (95%).
SETTLED = 0.9
# Shifted features of which resampling keeps less are not settled at all.
SHAKY = 0.5
# Larger factors are not reported: the rule does not extrapolate so far.
MOST_TIMES = 100


def times_for_overlap(overlap: float) -> float:
    """Factor of the number of prompts at which resampling keeps 90% of the shifted features, from the share kept now.

    A feature leaves or enters the set when its error exceeds its distance from the border, so the share that changes
    is, to first order, proportional to the error: n' / n = ((1 - overlap) / (1 - 0.9))^2, and 1 where it is settled.
    """
    return max(1.0, ((1 - overlap) / (1 - SETTLED)) ** 2)


def in_words(overlap: float) -> str:
    """Whether the shifted features are settled, as the predicate of a sentence."""
    if overlap >= SETTLED:
        return "is settled"
    return "is settled for the most part" if overlap >= SHAKY else "is not settled"


def pairs_apart(values: Sequence[float], intervals: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Share of the pairs of domains whose scores differ at 95%, and the factor of the number of prompts for 90%.

    values: [n_domains] scores; intervals: their 95% intervals, (low, high) each; two domains or more

    With standard errors s = (high - low) / (2 * 1.96), a pair is apart where z = |v_i - v_j| / sqrt(s_i^2 + s_j^2)
    exceeds 1.96, and would be with (1.96 / z)^2 times the prompts.
    """
    v, width = np.asarray(values, np.float64), np.diff(np.asarray(intervals, np.float64), axis=1)[:, 0]
    i, j = np.triu_indices(len(v), 1)
    least = np.hypot(width[i], width[j]) / 2  # 1.96 sqrt(s_i^2 + s_j^2)
    with np.errstate(divide="ignore", invalid="ignore"):
        needed = np.where(least > 0, (least / np.abs(v[i] - v[j])) ** 2, 0.0)
    times = float(np.sort(needed)[math.ceil(SETTLED * len(needed)) - 1])
    return float(np.mean(needed < 1)), max(1.0, times)


def n_more(n_prompts: int, times: float) -> int | None:
    """Number of prompts needed beyond n_prompts, 0 where it is settled; None where that is beyond the rule."""
    return None if times > MOST_TIMES else math.ceil(n_prompts * (times - 1))


def more(n_prompts: int, times: float, n_draws: int = 0) -> str:
    """The same in words; n_draws: draws of demonstrations now, where there must be more of them in proportion."""
    needed = n_more(n_prompts, times)
    if needed is None:
        return f"more than {MOST_TIMES} times the prompts would be needed"
    and_draws = f" and --demo-draws {math.ceil(n_draws * times)}" if n_draws else ""
    return f"about {needed:,} more prompts{and_draws} would settle it" if needed else "settled"


def shift_line(name: str, top_n: int, n_prompts: int, overlap: float) -> str:
    """One line after a training set's shift has been measured."""
    return (
        f"{name}: resampling its {n_prompts} prompts keeps {overlap:.0%} of the top {top_n} features; "
        f"{more(n_prompts, times_for_overlap(overlap))} ({SETTLED:.0%} kept)"
    )


def ranking_line(
    name: str,
    label: str,
    n_prompts: int,
    values: Sequence[float],
    intervals: Sequence[Sequence[float]],
    n_draws: int = 0,
) -> str:
    """One line after the domains have been scored.

    label: of the estimator; n_prompts: of a domain, in the mean; n_draws: of demonstrations, where it has any
    """
    apart, times = pairs_apart(values, intervals)
    return (
        f"{name}: by {label} {apart:.0%} of the pairs of domains are apart; a domain has {n_prompts} prompts, "
        f"{more(n_prompts, times, n_draws)} ({SETTLED:.0%} apart)"
    )
