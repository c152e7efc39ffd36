"""What a forecast is held against: other features, raw dimensions, cosines, and how well the base model answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import linalg, stats
from scipy.spatial import distance

from sts_fast.forecast import controls
from sts_fast.forecast.estimators import SIZES
from sts_fast.forecast.run import scores_schema
from sts_fast.profile.residuals import ResidualSums

# --- other features ---


def test_random_sets_lie_outside_the_shifted_features() -> None:
    top = np.asarray([7, 0, 3, 11])
    sets = controls.random_sets(20, top, np.random.default_rng(0))
    assert sets.shape == (controls.N_RANDOM_SETS, 4)
    assert not np.isin(sets, top).any()
    assert all(members == sorted(set(members)) for members in sets.tolist())
    assert len({tuple(members) for members in sets.tolist()}) > 1
    assert sets.tolist() == controls.random_sets(20, top, np.random.default_rng(0)).tolist()
    assert sets.tolist() != controls.random_sets(20, top, np.random.default_rng(1)).tolist()


def test_random_sets_draw_each_feature_as_often() -> None:
    top = np.asarray([2, 5, 9])
    drawn = np.concatenate([controls.random_sets(23, top, np.random.default_rng(seed)).ravel() for seed in range(100)])
    counts = np.bincount(drawn, minlength=23)
    outside = np.setdiff1d(np.arange(23), top)
    assert counts[outside].sum() == len(drawn)
    assert stats.chisquare(counts[outside]).pvalue > 0.01


@pytest.mark.parametrize(("d_sae", "top_n", "n_outside"), [(8, 4, 4), (7, 4, 3), (4, 4, 0)])
def test_random_sets_where_few_features_lie_outside(d_sae: int, top_n: int, n_outside: int) -> None:
    """As long as enough of them do, none is of D_N; else any may be."""
    sets = controls.random_sets(d_sae, np.arange(top_n), np.random.default_rng(0))
    assert sets.shape == (controls.N_RANDOM_SETS, top_n)
    assert all(len(set(members)) == top_n and set(members) <= set(range(d_sae)) for members in sets.tolist())
    if n_outside >= top_n:
        assert sets.tolist() == [list(range(top_n, d_sae))] * controls.N_RANDOM_SETS


@pytest.mark.parametrize(
    ("importance", "n_fired", "top", "expected"),
    [
        # 1 and 4 never fire, 0 and 2 are shifted most.
        ([9.0, 0.0, 8.0, 3.0, 0.0, 1.0, 2.0], [1, 0, 2, 5, 0, 1, 3], [0, 2], [5, 6]),
        # What fires without shifting comes first; ascending, not in the order of shifts.
        ([9.0, 5.0, 0.0, 8.0, 1.0, 0.0], [1, 1, 1, 1, 1, 0], [0, 3], [2, 4]),
        ([9.0, 3.0, 1.0, 8.0, 2.0, 5.0], [1, 1, 1, 1, 1, 1], [0, 3], [2, 4]),
        # Among equals the lower index.
        ([9.0, 8.0, 1.0, 1.0, 1.0], [1, 1, 1, 1, 1], [0, 1], [2, 3]),
        # Fewer fire outside D_N than D_N has features; none does.
        ([9.0, 8.0, 7.0, 1.0, 0.0], [1, 1, 1, 1, 0], [0, 1, 2], [3]),
        ([9.0, 8.0, 0.0, 0.0], [1, 1, 0, 0], [0, 1], []),
        # D_N may hold features that do not fire, where too few shift.
        ([9.0, 0.0, 0.0, 0.0], [1, 0, 2, 1], [0, 1], [2, 3]),
    ],
)
def test_low_shift_by_hand(importance: list[float], n_fired: list[int], top: list[int], expected: list[int]) -> None:
    found = controls.low_shift(np.asarray(importance), np.asarray(n_fired), np.asarray(top))
    assert found.tolist() == expected
    assert found.dtype.kind == "i"


@pytest.mark.parametrize("seed", range(5))
def test_low_shift_and_most_active_of_random_features(seed: int) -> None:
    """Both against a sort of all features, with many ties and many features that never fire."""
    rng = np.random.default_rng(seed)
    d_sae, top_n = 300, 40
    importance = rng.integers(0, 12, d_sae) / 7
    n_fired = rng.integers(0, 3, d_sae)
    mean_activation = rng.integers(0, 30, d_sae) / 3
    top = np.asarray(sorted(range(d_sae), key=lambda j: (-importance[j], j))[:top_n])
    outside = [j for j in range(d_sae) if n_fired[j] and j not in set(top.tolist())]
    least = sorted(outside, key=lambda j: (importance[j], j))[:top_n]
    assert controls.low_shift(importance, n_fired, top).tolist() == sorted(least)
    most = sorted(range(d_sae), key=lambda j: (-mean_activation[j], j))[:top_n]
    assert controls.most_active(mean_activation, top_n).tolist() == sorted(most)


@pytest.mark.parametrize(
    ("mean_activation", "top_n", "expected"),
    [
        ([0.5, 3.0, 0.0, 4.0, 1.0], 2, [1, 3]),
        ([2.0, 1.0, 2.0, 2.0], 2, [0, 2]),
        ([0.0, 0.0, 1.0], 2, [0, 2]),
        ([1.0, 2.0], 2, [0, 1]),
    ],
)
def test_most_active_by_hand(mean_activation: list[float], top_n: int, expected: list[int]) -> None:
    assert controls.most_active(np.asarray(mean_activation), top_n).tolist() == expected


# --- the residual stream itself ---


def residuals(sq_shift: list[float] | None = None, abs_base: list[float] | None = None) -> ResidualSums:
    sums = ResidualSums.zero(len(sq_shift or abs_base or []))
    if sq_shift is not None:
        sums.sq_shift.add(np.asarray(sq_shift))
        sums.counts[1] = 1
    if abs_base is not None:
        sums.abs_base.add(np.asarray(abs_base))
        sums.counts[0] = 1
    return sums


@pytest.mark.parametrize(("top_n", "expected"), [(1, [6]), (2, [1, 6]), (100, [1, 6])])
def test_raw_dimensions_without_pairs_are_the_largest(top_n: int, expected: list[int]) -> None:
    """As soon as there are pairs, those with the largest squared differences."""
    sizes = [0.0, 3, 1, 0, 0, 2, 5, 0]
    assert controls.raw_dimensions(residuals(abs_base=sizes), top_n).tolist() == expected
    shifted = residuals([81.0, 0, 0, 0, 49, 0, 0, 0], sizes)
    assert controls.raw_dimensions(shifted, 2).tolist() == [0, 4]


@pytest.mark.parametrize(
    ("squared", "top_n", "expected"),
    [
        ([1.0, 5.0, 2.0, 4.0, 0.0, 3.0, 0.0, 0.0], 1, [1]),
        ([1.0, 5.0, 2.0, 4.0, 0.0, 3.0, 0.0, 0.0], 2, [1, 3]),
        ([1.0, 4.0, 2.0, 5.0, 0.0, 3.0, 0.0, 0.0], 2, [1, 3]),  # ascending
        ([1.0, 5.0, 2.0, 4.0, 0.0, 3.0, 0.0, 0.0], 100, [1, 3]),  # at most a quarter of the dimensions
        ([1.0, 5.0, 2.0], 100, [1]),  # but one at least
        ([2.0, 1.0, 2.0, 0.0, 2.0, 0.0, 0.0, 0.0], 2, [0, 2]),  # among equals the lower
        ([0.0] * 8, 2, [0, 1]),
    ],
)
def test_raw_dimensions_by_hand(squared: list[float], top_n: int, expected: list[int]) -> None:
    assert controls.raw_dimensions(residuals(squared), top_n).tolist() == expected


# --- the angle between means ---


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1.0, 0.0], [3.0, 0.0], 1.0),
        ([1.0, 0.0], [-3.0, 0.0], -1.0),
        ([1.0, 0.0], [0.0, 2.0], 0.0),
        ([1.0, 1.0], [1.0, 0.0], 0.5**0.5),
        ([0.0, 0.0], [1.0, 2.0], 0.0),
        ([1.0, 2.0], [0.0, 0.0], 0.0),
    ],
)
def test_cosine_by_hand(a: list[float], b: list[float], expected: float) -> None:
    assert controls.cosine(np.asarray(a), np.asarray(b)) == pytest.approx(expected, abs=1e-15)


def test_cosine_equals_scipy() -> None:
    rng = np.random.default_rng(0)
    for a, b in rng.normal(size=(20, 2, 100)):
        assert controls.cosine(a, b) == pytest.approx(1 - distance.cosine(a, b), rel=1e-12, abs=1e-14)
        assert controls.cosine(3e5 * a, 1e-5 * b) == pytest.approx(controls.cosine(a, b), rel=1e-12)
        assert controls.cosine(a, b) == controls.cosine(b, a)


# --- likenesses of whole sets ---


def test_probe_is_the_direction_that_separates_best() -> None:
    rng = np.random.default_rng(1)
    sets = [rng.standard_normal((400, 5)) @ rng.standard_normal((5, 5)) + rng.standard_normal(5) for _ in range(4)]
    means, covariances = np.stack([x.mean(axis=0) for x in sets]), np.stack([np.cov(x.T, ddof=0) for x in sets])
    logits = controls.probe_logits(means[0], means[1:], covariances)
    pooled = covariances.mean(axis=0) + 1e-3 * np.trace(covariances.mean(axis=0)) / 5 * np.eye(5)
    apart = means[0] - means[1:].mean(axis=0)

    def ratio(w: Any) -> float:
        return float((w @ apart) ** 2 / (w @ pooled @ w))

    w = linalg.solve(pooled, apart, assume_a="pos")
    assert all(ratio(w) >= ratio(w + 0.1 * rng.standard_normal(5)) for _ in range(50))
    np.testing.assert_allclose(logits, (means[1:] - (means[0] + means[1:].mean(axis=0)) / 2) @ w, rtol=1e-9)
    # Domains lie on the other side of the boundary, on average as far from it as the training set.
    assert logits.mean() == pytest.approx(-(w @ apart) / 2)


def test_sets_without_spread_or_difference_say_nothing() -> None:
    zero = np.zeros((3, 3))
    assert controls.cka(zero, np.eye(3)) == 0
    assert controls.probe_logits(np.ones(3), np.zeros((2, 3)), np.stack([zero, zero])).tolist() == [0, 0]
    # One domain, and a feature that all domains have alike.
    assert controls.z_scored(np.asarray([[1.0, 2.0]])).tolist() == [0]
    assert controls.z_scored(np.asarray([[1.0, 0.1], [3.0, 0.1], [5.0, 0.1]])) == pytest.approx(
        np.asarray([-1, 0, 1]) * 1.5**0.5
    )


# --- the tuple of all controls ---


def test_every_control_is_a_pick_or_a_comparison() -> None:
    names = [control.name for control in controls.CONTROLS]
    assert len(set(names)) == len(names)
    for control in controls.CONTROLS:
        assert (control.pick is None) != (control.compare is None)
        assert bool(control.quantity) == (control.compare is not None)
        assert control.of in ("features", "residual") or control.pick is None


def test_the_schema_knows_the_number_of_every_control() -> None:
    names = scores_schema()["$defs"]["control_number"]["enum"]
    assert {control.quantity for control in controls.CONTROLS if control.quantity} <= {*names}
    assert names[: len(SIZES)] == list(SIZES)
