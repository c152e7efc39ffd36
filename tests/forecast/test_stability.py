"""How many more prompts would settle a forecast, against simulation."""

from __future__ import annotations

import numpy as np
import pytest

from sts_fast.forecast import stability

N_FEATURES, TOP_N = 2000, 100


def overlap_of(n_prompts: int, means: np.ndarray, rng: np.random.Generator) -> float:
    """Share of the top features that resampling n_prompts keeps; a feature's mean has an error of 3 / sqrt(n)."""
    seen = means + 3 * rng.normal(size=N_FEATURES) / n_prompts**0.5
    kept = []
    for _ in range(20):
        again = seen + 3 * rng.normal(size=N_FEATURES) / n_prompts**0.5
        kept.append(len(np.intersect1d(np.argsort(-seen)[:TOP_N], np.argsort(-again)[:TOP_N])) / TOP_N)
    return float(np.mean(kept))


def test_the_rule_for_features_holds_in_simulation() -> None:
    """With as many times the prompts as the rule says, about 90% is kept."""
    rng = np.random.default_rng(0)
    means = rng.exponential(size=N_FEATURES)
    for n_prompts in (10, 20, 50):
        times = stability.times_for_overlap(overlap_of(n_prompts, means, rng))
        assert times > 1
        assert overlap_of(round(n_prompts * times), means, rng) == pytest.approx(stability.SETTLED, abs=0.03)
    assert stability.times_for_overlap(0.9) == stability.times_for_overlap(1.0) == 1


def test_the_rule_for_domains_holds_in_simulation() -> None:
    rng = np.random.default_rng(0)
    means = rng.normal(size=20)

    def measured(n_prompts: float) -> tuple[float, float]:
        error = 3 / n_prompts**0.5
        return stability.pairs_apart(list(means), [(v - 1.959964 * error, v + 1.959964 * error) for v in means])

    apart, times = measured(50)
    assert apart < stability.SETTLED
    assert measured(50 * times * 0.98)[0] < stability.SETTLED <= measured(50 * times * 1.02)[0]
    # The share itself, by its definition.
    i, j = np.triu_indices(20, 1)
    z = np.abs(means[i] - means[j]) / (2**0.5 * 3 / 50**0.5)
    assert apart == pytest.approx(np.mean(z > 1.959964))


def test_domains_without_error_or_without_difference() -> None:
    assert stability.pairs_apart([1.0, 2.0], [(1, 1), (2, 2)]) == (1.0, 1.0)
    apart, times = stability.pairs_apart([1.0, 1.0], [(0.5, 1.5), (0.5, 1.5)])
    assert (apart, times) == (0.0, float("inf"))


def test_a_forecast_tells_what_would_settle_it() -> None:
    """0 where it is settled, nothing beyond the rule."""
    assert [stability.n_more(64, times) for times in (1.0, 2.5, 100.0, 100.1, float("inf"))] == [
        0,
        96,
        6336,
        None,
        None,
    ]


def test_lines_say_what_it_takes() -> None:
    assert stability.shift_line("train", 100, 64, 0.95) == (
        "train: resampling its 64 prompts keeps 95% of the top 100 features; settled (90% kept)"
    )
    assert "keeps 80% of the top 100 features; about 192 more prompts would settle it" in stability.shift_line(
        "train", 100, 64, 0.8
    )
    assert "0% of the pairs of domains are apart; a domain has 8 prompts, more than 100 times the prompts" in (
        stability.ranking_line("train", "STS_act", 8, [1.0, 1.0], [(0.5, 1.5), (0.5, 1.5)])
    )
