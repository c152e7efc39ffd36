"""Streaming correlations against numpy.corrcoef over dense features, which are exact in float32 here.

Rows that are `put` are summed by the core and by the plain torch ops, which read targets as float32.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exact_sae import KINDS, Put, assert_sums, features, make_acts, make_sae
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from sts_fast import CorrelationStats, InputError, files
from sts_fast.sae import SAE

N = 400
ARRAYS = ("sum_h", "sum_sq_h", "n_fired", "sum_hy", "sum_y", "sum_sq_y", "origin")


def make_targets(n: int = N, n_targets: int = 3, *, offset: float = 0.0) -> np.ndarray:
    """[n, n_targets] real numbers that go along with the activations to different degrees."""
    rng = np.random.default_rng(7)
    signal = make_acts(n) @ rng.normal(size=(24, n_targets))
    return offset + signal + rng.normal(size=(n, n_targets)) * np.linspace(0.1, 30, n_targets)


def by_numpy(h: np.ndarray, y: np.ndarray) -> np.ndarray:
    """[n_targets, d_sae] by numpy.corrcoef, one pair at a time; NaN where either does not vary."""
    r = np.full((y.shape[1], h.shape[1]), np.nan)
    for k in range(y.shape[1]):
        for j in range(h.shape[1]):
            if np.ptp(h[:, j]) > 0 and np.ptp(y[:, k]) > 0:
                r[k, j] = np.corrcoef(h[:, j], y[:, k])[0, 1]
    return r


def streamed(sae: SAE, acts: Any, targets: np.ndarray, cuts: list[int] | None = None) -> CorrelationStats:
    stats = CorrelationStats(sae, targets.shape[1])
    for start, stop in zip([0, *(cuts or [])], [*(cuts or []), len(acts)], strict=True):
        stats.update(acts[start:stop], targets[start:stop])
    return stats


def tolerance(put: Put) -> float:
    """Of a correlation."""
    return max(1e-9, 10 * put.rounding)


def state(stats: CorrelationStats) -> dict[str, Any]:
    return {**{name: getattr(stats, name).copy() for name in ARRAYS}, "n_tokens": stats.n_tokens}


# Against float64 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_targets", [1, 3, 17])
def test_pearson_is_numpy_s(put: Put, kind: str, n_targets: int) -> None:
    sae, acts, targets = make_sae(kind), make_acts(N), make_targets(n_targets=n_targets)
    expected = by_numpy(features(sae, acts), targets)
    assert np.isfinite(expected).mean() > 0.5
    assert np.nanmax(np.abs(expected)) > 0.2
    acts = put(acts)
    actual = streamed(sae, acts, targets).pearson()
    assert actual.shape == (n_targets, sae.d_sae)
    assert np.array_equal(np.isnan(actual), np.isnan(expected))
    assert np.nanmax(np.abs(actual - expected)) < tolerance(put)


@pytest.mark.parametrize("offset", [1e3, -1e6, 1e9])
def test_targets_far_from_zero_lose_nothing(put: Put, offset: float) -> None:
    sae, acts, targets = make_sae(), make_acts(N), make_targets(offset=offset)
    expected = by_numpy(features(sae, acts), targets - targets.mean(axis=0))
    acts = put(acts)
    actual = streamed(sae, acts, targets).pearson()
    assert np.nanmax(np.abs(actual - expected)) < tolerance(put)


@pytest.mark.parametrize("kind", KINDS)
def test_sums_are_those_of_dense_float64(put: Put, kind: str) -> None:
    sae, acts = make_sae(kind), make_acts(N)
    targets = np.random.default_rng(8).integers(-5, 6, (N, 3)).astype(np.float64)
    h, y = features(sae, acts), targets - targets[0]
    assert_sums(
        state(streamed(sae, put(acts), targets)),
        {
            "sum_h": h.sum(axis=0),
            "sum_sq_h": (h**2).sum(axis=0),
            "n_fired": (h != 0).sum(axis=0),
            "sum_hy": h.T @ y,
            "sum_y": y.sum(axis=0),
            "sum_sq_y": (y**2).sum(axis=0),
            "origin": targets[0],
            "n_tokens": N,
        },
        put.rounding,
    )


def test_what_does_not_vary_has_no_correlation(put: Put) -> None:
    sae, acts, targets = make_sae(), make_acts(N), make_targets()
    sae.b_enc[:3] = [-1000, 1000, 0]  # never fires; always fires, and still varies; as it was
    sae.W_enc[:, 4] = 0
    sae.b_enc[4] = 7  # always 7
    targets[:, 1] = 0.1  # a constant that binary fractions do not hold exactly
    r = streamed(sae, put(acts), targets, [13, 200]).pearson()
    assert np.isnan(r[1]).all()
    assert np.isnan(r[:, [0, 4]]).all()
    assert np.isfinite(r[[0, 2], 1]).all()
    assert np.isfinite(r[[0, 2], 2]).all()


def test_perfect_correlation(put: Put) -> None:
    sae, acts = make_sae(), make_acts(N)
    h = features(sae, acts)
    r = streamed(sae, put(acts), np.stack([h[:, 5], -3 * h[:, 6] + 1000], axis=1)).pearson()
    within = 1e-5 if put.as_tensors else 1e-12
    assert r[0, 5] == pytest.approx(1, abs=within)
    assert r[1, 6] == pytest.approx(-1, abs=within)
    assert (np.abs(r[np.isfinite(r)]) <= 1 + within).all()


def test_no_rows_and_one_row(put: Put) -> None:
    sae = make_sae()
    stats = CorrelationStats(sae, 2)
    stats.update(put(np.zeros((0, 24), np.float32)), np.zeros((0, 2)))
    assert (stats.n_tokens, stats.origin.tolist()) == (0, [0.0, 0.0])
    with pytest.raises(InputError, match=r"^no tokens have been added yet: call update with rows first$"):
        stats.pearson()
    stats.update(put(make_acts(1)), [[5.0, 6.0]])
    assert np.isnan(stats.pearson()).all()
    assert (stats.n_tokens, stats.origin.tolist()) == (1, [5.0, 6.0])


@pytest.mark.parametrize("form", ["float32", "integers", "lists", "booleans", "column by column"])
def test_forms_of_targets(put: Put, form: str) -> None:
    sae, acts = make_sae(), make_acts(N)
    whole = np.random.default_rng(8).integers(0, 2, (N, 3))
    targets = {
        "float32": whole.astype(np.float32),
        "integers": whole,
        "lists": whole.tolist(),
        "booleans": whole.astype(bool),
        "column by column": np.asfortranarray(whole.astype(np.float64)),
    }[form]
    stats = CorrelationStats(sae, 3)
    stats.update(put(acts), targets)
    assert np.nanmax(np.abs(stats.pearson() - by_numpy(features(sae, acts), whole.astype(np.float64)))) < tolerance(put)


# Splits and merges ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(0, N), max_size=6).map(sorted))
def test_any_split_into_updates_gives_the_same_bits(kind: str, cuts: list[int]) -> None:
    sae, targets = make_sae(kind), make_targets()
    acts = np.random.default_rng(1).normal(size=(N, 24)).astype(np.float32)
    assert_sums(state(streamed(sae, acts, targets, cuts)), state(streamed(sae, acts, targets)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_parts_with_different_origins_add_up(put: Put, kind: str, offset: float) -> None:
    sae, acts, targets = make_sae(kind), make_acts(N), make_targets(offset=offset)
    targets[100:] += 50  # the second and third part start far from the first
    h, acts = features(sae, acts), put(acts)
    parts = [streamed(sae, acts[part], targets[part]) for part in (slice(0, 100), slice(100, 107), slice(107, N))]
    assert not np.array_equal(parts[0].origin, parts[1].origin)
    empty = CorrelationStats(sae, 3)
    before = state(parts[0])
    expected = by_numpy(h, targets - targets.mean(axis=0))
    for total in (
        parts[0] + parts[1] + parts[2],
        parts[2] + (parts[1] + parts[0]),
        empty + parts[1] + parts[0] + empty + parts[2],
    ):
        assert total.n_tokens == N
        assert np.nanmax(np.abs(total.pearson() - expected)) < tolerance(put)
    assert_sums(state(parts[0]), before)
    total = parts[0] + parts[1]
    total.update(acts[107:], targets[107:])
    assert np.nanmax(np.abs(total.pearson() - expected)) < tolerance(put)
    assert_sums(state(parts[0]), before)


def test_adding_nothing_changes_nothing(put: Put) -> None:
    stats, empty = streamed(make_sae(), put(make_acts(N)), make_targets()), CorrelationStats(make_sae(), 3)
    assert_sums(state(stats + empty), state(stats))
    assert_sums(state(empty + stats), state(stats))
    assert (empty + empty).n_tokens == 0


def test_a_constant_target_stays_constant_in_a_merge(put: Put) -> None:
    sae, acts, targets = make_sae(), put(make_acts(N)), make_targets()
    targets[:, 0] = 0.1
    total = streamed(sae, acts[:150], targets[:150]) + streamed(sae, acts[150:], targets[150:])
    assert np.isnan(total.pearson()[0]).all()


def test_what_cannot_be_added() -> None:
    stats = CorrelationStats(make_sae(), 2)
    sae = make_sae()
    other_weights = replace(sae, W_enc=-sae.W_enc)
    for other in (
        CorrelationStats(sae, 3),
        CorrelationStats(make_sae("gated"), 2),
        CorrelationStats(other_weights, 2),
    ):
        with pytest.raises(ValueError, match="different SAEs or numbers of targets"):
            stats + other


# Files ----------------------------------------------------------------------------------------------------------------


def test_save_and_load(put: Put, tmp_path: Path) -> None:
    sae, acts, targets = make_sae(), put(make_acts(N)), make_targets(offset=100)
    stats = streamed(sae, acts[:70], targets[:70])
    stats.save(tmp_path / "c.safetensors", shifted_features=np.array([3, 1]))
    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"]
    assert load_file(tmp_path / "c.safetensors")["shifted_features"].tolist() == [3, 1]
    loaded = CorrelationStats.load(tmp_path / "c.safetensors")
    assert_sums(state(loaded), state(stats))
    assert np.array_equal(loaded.pearson(), stats.pearson(), equal_nan=True)
    with pytest.raises(ValueError, match="loaded without their SAE"):
        loaded.update(acts, targets)
    resumed = CorrelationStats.load(tmp_path / "c.safetensors", sae)
    resumed.update(acts[70:], targets[70:])
    assert_sums(state(resumed), state(streamed(sae, acts, targets)), put.rounding)
    with pytest.raises(InputError, match="statistics of 70 features, but the SAE has 71"):
        CorrelationStats.load(tmp_path / "c.safetensors", make_sae(d_sae=71))


@pytest.mark.parametrize("name", ARRAYS)
def test_a_file_that_lacks_a_sum_is_damaged(name: str, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    CorrelationStats(make_sae(), 2).save(path)
    arrays = load_file(path)
    del arrays[name]
    files.save_arrays(path, arrays, {"kind": "CorrelationStats", "n_tokens": "0", "sae_source": "x"})
    with pytest.raises(InputError, match=f"has no '{name}': it is damaged"):
        CorrelationStats.load(path)


# Faults ---------------------------------------------------------------------------------------------------------------


def spoilt(array: np.ndarray, value: float) -> np.ndarray:
    array = array.copy()
    array[-1, -1] = value
    return array


ACTS, TARGETS = make_acts(8), make_targets(8)


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize(
    ("acts", "targets", "message"),
    [
        (spoilt(ACTS, np.nan), TARGETS, "acts"),
        (spoilt(ACTS, np.inf), TARGETS, "acts"),
        (ACTS[:, :-1], TARGETS, "acts"),
        (ACTS.astype(np.int16), TARGETS, "acts"),
        (ACTS, np.ma.masked_greater(TARGETS, 3), "targets is a masked array, whose mask would be ignored"),
        (ACTS, TARGETS + 1j, "targets must be real numbers, got complex128"),
        (ACTS, TARGETS.astype(object), "targets must be real numbers, got object"),
        (ACTS, TARGETS.astype(str), "targets must be real numbers, got <U32"),
        (ACTS, torch.from_numpy(TARGETS).requires_grad_(), r"targets requires grad.*: pass targets\.detach\(\)"),
        (ACTS[:7], TARGETS, r"targets must have shape \(7, 3\), but has \(8, 3\): pass one row for each token"),
        (ACTS, TARGETS[:, :2], r"targets must have shape \(8, 3\), but has \(8, 2\)"),
        (ACTS, torch.from_numpy(TARGETS).to_sparse(), r"targets is a sparse tensor: pass targets\.to_dense\(\)"),
        (ACTS, np.full((8, 3), "2020-01-01", "M8[D]"), r"targets must be real numbers, got datetime64"),
        (ACTS, TARGETS.T, r"targets must have shape \(8, 3\), but has \(3, 8\): pass numpy\.transpose\(targets\)"),
        (ACTS, TARGETS.reshape(2, 4, 3).tolist(), r"but has \(2, 4, 3\): pass numpy\.reshape\(targets, \(8, 3\)\)"),
        (ACTS, TARGETS[:, 0], r"targets must have shape \(8, 3\), but has \(8,\)"),
        (ACTS, spoilt(TARGETS, np.nan), "targets contains a NaN or infinity at row 7, column 2"),
        (ACTS, spoilt(TARGETS, -np.inf), "targets contains a NaN or infinity"),
    ],
)
def test_faults_name_the_argument_and_add_nothing(
    put: Put, acts: Any, targets: Any, message: str, is_first: bool
) -> None:
    stats = CorrelationStats(make_sae(), 3)
    if not is_first:
        stats.update(put(make_acts(N)), make_targets())
    before = state(stats)
    with pytest.raises(ValueError, match=message):
        stats.update(put(acts), targets)
    assert_sums(state(stats), before)
