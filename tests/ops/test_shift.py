"""Sums over paired rows, against dense float64; with numbers exact in float32 they must be equal to the last bit.

Rows that are `put` are summed by the core and by the plain torch ops.
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
from safetensors.numpy import load_file, save_file

import sts_fast
from sts_fast import InputError, ShiftStats, files
from sts_fast.ops.shift import top_indices
from sts_fast.sae import SAE

N = 120
SUMS = ("sum_sq_shift", "sum_base", "sum_other", "sum_sq_base", "sum_sq_other", "n_fired_base", "n_fired_other")
ARRAYS = (*SUMS, "weighted_sq_shift")


def literal(sae: SAE, base: np.ndarray, other: np.ndarray, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Every sum as the docstring of ShiftStats says it, over dense features."""
    h, g = features(sae, base), features(sae, other)
    return {
        "sum_sq_shift": ((g - h) ** 2).sum(axis=0),
        "sum_base": h.sum(axis=0),
        "sum_other": g.sum(axis=0),
        "sum_sq_base": (h**2).sum(axis=0),
        "sum_sq_other": (g**2).sum(axis=0),
        "n_fired_base": (h != 0).sum(axis=0),
        "n_fired_other": (g != 0).sum(axis=0),
        "weighted_sq_shift": ((g - h) ** 2).T @ (np.zeros((len(h), 0)) if weights is None else weights),
    }


def pairs(n: int = N, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return make_acts(n, seed=2 * seed), make_acts(n, seed=2 * seed + 1)


def draws(n: int = N, n_replicates: int = 5) -> np.ndarray:
    """Whole weights, as resamples have, some of them zero."""
    return np.random.default_rng(9).integers(0, 4, (n, n_replicates)).astype(np.float64)


def state(stats: ShiftStats) -> dict[str, Any]:
    return {**{name: getattr(stats, name).copy() for name in ARRAYS}, "n_tokens": stats.n_tokens}


def assert_equal(
    actual: ShiftStats | dict[str, Any], expected: ShiftStats | dict[str, Any], rounding: float = 0.0
) -> None:
    actual, expected = (s if isinstance(s, dict) else state(s) for s in (actual, expected))
    assert_sums(actual, expected, rounding)


# Against float64 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_sums_are_those_of_dense_float64(put: Put, kind: str, apply_b_dec_to_input: bool) -> None:
    sae = replace(make_sae(kind), apply_b_dec_to_input=apply_b_dec_to_input)
    base, other = pairs()
    stats = ShiftStats(sae)
    stats.update(put(base), put(other))
    expected = literal(sae, base, other)
    assert_equal(stats, {**expected, "n_tokens": N}, put.rounding)
    assert np.array_equal(stats.mean_squared_shift, stats.sum_sq_shift / N)
    assert np.array_equal(stats.mean_base, stats.sum_base / N)
    assert np.array_equal(stats.mean_other, stats.sum_other / N)
    assert stats.columns.tolist() == list(range(sae.d_sae))


@pytest.mark.parametrize("kind", KINDS)
def test_weighted_replicates(put: Put, kind: str) -> None:
    sae, (base, other), weights = make_sae(kind), pairs(), draws()
    stats = ShiftStats(sae, n_replicates=5)
    stats.update(put(base), put(other), weights)
    assert_equal(stats, literal(sae, base, other, weights), put.rounding)
    # A replicate that draws every row once is the sum itself, and one that draws the first half twice is that half's.
    weights = np.stack([np.ones(N), 2.0 * (np.arange(N) < N // 2)], axis=1)
    stats = ShiftStats(sae, n_replicates=2)
    stats.update(put(base), put(other), weights)
    half = literal(sae, base[: N // 2], other[: N // 2])["sum_sq_shift"]
    expected = {"weighted_sq_shift": np.stack([stats.sum_sq_shift, 2 * half], axis=1)}
    assert_equal(stats, expected, put.rounding)


@pytest.mark.parametrize("kind", KINDS)
def test_a_subset_of_columns(put: Put, kind: str) -> None:
    sae, (base, other), weights = make_sae(kind), pairs(), draws()
    columns = np.array([1, 2, 30, 69])
    stats = ShiftStats(sae, columns=columns, n_replicates=5)
    stats.update(put(base), put(other), weights)
    expected = {name: value[columns] for name, value in literal(sae, base, other, weights).items()}
    assert_equal(stats, expected, put.rounding)
    assert stats.columns.tolist() == columns.tolist()
    order = sorted(columns.tolist(), key=lambda j: (-literal(sae, base, other)["sum_sq_shift"][j], j))
    assert stats.top(3).tolist() == order[:3]


@pytest.mark.parametrize("kind", KINDS)
def test_real_numbers_agree_to_rounding(put: Put, kind: str) -> None:
    rng = np.random.default_rng(5)
    sae = make_sae(kind)
    sae = replace(sae, W_enc=rng.normal(size=sae.W_enc.shape).astype(np.float32))
    base = rng.normal(size=(400, sae.d_in)).astype(np.float32)
    other = base + rng.normal(size=base.shape).astype(np.float32)
    stats = ShiftStats(sae)
    stats.update(put(base), put(other))
    expected = literal(sae, base, other)
    n_flips = np.abs(stats.n_fired_base - expected["n_fired_base"]) + np.abs(
        stats.n_fired_other - expected["n_fired_other"]
    )
    assert n_flips.sum() <= 2
    same = n_flips == 0
    for name in SUMS[:5]:
        scale = expected[name].max()
        assert np.abs(getattr(stats, name) - expected[name])[same].max() <= 1e-5 * scale, name


@pytest.mark.parametrize("form", ["bfloat16", "float32 tensors", "one of each"])
def test_forms_of_activations(form: str) -> None:
    sae, (base, other) = make_sae("jumprelu"), pairs()
    there: Any = torch.from_numpy(other)
    here: Any = base if form == "one of each" else torch.from_numpy(base)
    if form == "bfloat16":
        here, there = here.bfloat16(), there.bfloat16()
    stats = ShiftStats(sae)
    stats.update(here, there)
    assert_equal(stats, literal(sae, base, other))


# Splits and merges ----------------------------------------------------------------------------------------------------


def real_pairs(n: int = 203) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers whose sums depend on the order of summation, so that equality means the same order."""
    rng = np.random.default_rng(6)
    base = rng.normal(size=(n, 24)).astype(np.float32)
    return base, rng.normal(size=(n, 24)).astype(np.float32), rng.random((n, 3))


def streamed(sae: SAE, cuts: list[int]) -> ShiftStats:
    base, other, weights = real_pairs()
    stats = ShiftStats(sae, n_replicates=3)
    for start, stop in zip([0, *cuts], [*cuts, len(base)], strict=True):
        stats.update(torch.from_numpy(base[start:stop]), torch.from_numpy(other[start:stop]), weights[start:stop])
    return stats


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(0, 203), max_size=6).map(sorted))
def test_any_split_into_updates_gives_the_same_bits(kind: str, cuts: list[int]) -> None:
    sae = make_sae(kind)
    assert_equal(streamed(sae, cuts), streamed(sae, []))


@pytest.fixture
def restored_threads() -> Any:
    before = sts_fast.get_num_threads()
    yield
    sts_fast.set_num_threads(before)


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_threads_gives_the_same_bits(kind: str) -> None:
    sae = make_sae(kind)
    results = []
    for n in (1, 2, 5):
        sts_fast.set_num_threads(n)
        assert sts_fast.get_num_threads() == n
        results.append(streamed(sae, [50]))
    assert_equal(results[1], results[0])
    assert_equal(results[2], results[0])


@pytest.mark.parametrize("kind", KINDS)
def test_parts_add_up_to_the_whole(put: Put, kind: str) -> None:
    sae, (base, other), weights = make_sae(kind), pairs(), draws()
    parts = []
    for part in (slice(0, 7), slice(7, 80), slice(80, N)):
        parts.append(ShiftStats(sae, n_replicates=5))
        parts[-1].update(put(base[part]), put(other[part]), weights[part])
    empty = ShiftStats(sae, n_replicates=5)
    before = state(parts[0])
    whole = {**literal(sae, base, other, weights), "n_tokens": N}
    assert_equal(parts[0] + parts[1] + parts[2], whole, put.rounding)
    assert_equal(parts[2] + (empty + parts[0]) + parts[1] + empty, whole, put.rounding)
    assert_equal(parts[0], before)
    total = parts[0] + parts[1]
    total.update(put(base[80:]), put(other[80:]), weights[80:])
    assert_equal(total, whole, put.rounding)
    assert_equal(parts[0], before)


def test_an_sae_is_known_by_its_weights_not_by_its_path(tmp_path: Path) -> None:
    sae, (base, other) = make_sae(), pairs()
    here, there = ShiftStats(sae), ShiftStats(replace(sae, source="/the/same/folder"))
    here.update(base, other)
    there.update(base, other)
    assert (here + there).n_tokens == 2 * len(base)
    here.save(tmp_path / "s.safetensors")
    ShiftStats.load(tmp_path / "s.safetensors", replace(sae, source="moved"))
    with pytest.raises(InputError, match="statistics of another SAE"):
        ShiftStats.load(tmp_path / "s.safetensors", replace(sae, W_enc=-sae.W_enc))


def test_what_cannot_be_added() -> None:
    sae = make_sae()
    stats = ShiftStats(sae)
    for other in (
        ShiftStats(replace(sae, W_enc=-sae.W_enc)),
        ShiftStats(replace(sae, b_dec=sae.b_dec + 1)),
        ShiftStats(make_sae(d_sae=71)),
        ShiftStats(sae, columns=np.arange(69)),
        ShiftStats(sae, columns=np.arange(1, 71)[:69]),
    ):
        with pytest.raises(ValueError, match="different SAEs or features"):
            stats + other
    with pytest.raises(ValueError, match="different numbers of replicates"):
        stats + ShiftStats(sae, n_replicates=2)


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [None, [0, 5, 44]])
def test_save_and_load(put: Put, kind: str, columns: list[int] | None, tmp_path: Path) -> None:
    sae, (base, other), weights = make_sae(kind), tuple(map(put, pairs())), draws()
    subset = None if columns is None else np.array(columns)
    stats = ShiftStats(sae, columns=subset, n_replicates=5)
    stats.update(base[:70], other[:70], weights[:70])
    stats.save(tmp_path / "s.safetensors", shifted_features=np.array([3, 1]))
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]
    assert load_file(tmp_path / "s.safetensors")["shifted_features"].tolist() == [3, 1]

    loaded = ShiftStats.load(tmp_path / "s.safetensors")
    assert_equal(loaded, stats)
    assert (loaded.sae_source, loaded.d_sae) == (sae.source, sae.d_sae)
    assert np.array_equal(loaded.columns, stats.columns)
    assert np.array_equal(loaded.top(3), stats.top(3))
    with pytest.raises(ValueError, match="loaded without their SAE"):
        loaded.update(base, other, weights)
    assert_equal(loaded, stats)

    resumed = ShiftStats.load(tmp_path / "s.safetensors", sae)
    resumed.update(base[70:], other[70:], weights[70:])
    stats.update(base[70:], other[70:], weights[70:])
    assert_equal(resumed, stats)
    assert_equal(loaded + resumed, {name: state(loaded)[name] + state(resumed)[name] for name in state(loaded)})


def test_columns_that_were_cut_out_of_others_are_saved_as_they_are(tmp_path: Path) -> None:
    stats = ShiftStats(make_sae(), columns=np.arange(70)[10::20])
    stats.save(tmp_path / "s.safetensors", shifted_features=np.arange(10)[::-3])
    assert ShiftStats.load(tmp_path / "s.safetensors").columns.tolist() == [10, 30, 50]
    assert load_file(tmp_path / "s.safetensors")["shifted_features"].tolist() == [9, 6, 3, 0]


def test_statistics_without_replicates_or_rows_are_saved_too(tmp_path: Path) -> None:
    stats = ShiftStats(make_sae())
    stats.save(tmp_path / "s.safetensors")
    assert_equal(ShiftStats.load(tmp_path / "s.safetensors"), stats)


def test_files_that_are_not_statistics(tmp_path: Path) -> None:
    sae, path = make_sae(), tmp_path / "s.safetensors"
    with pytest.raises(InputError, match=r"there is no file .*s\.safetensors"):
        ShiftStats.load(path)
    path.write_bytes(b"no safetensors")
    with pytest.raises(InputError, match=r"s\.safetensors is not a readable safetensors file"):
        ShiftStats.load(path)
    save_file({"sum_sq_shift": np.zeros(3)}, path)
    with pytest.raises(InputError, match=r"s\.safetensors does not contain ShiftStats"):
        ShiftStats.load(path)
    sts_fast.CorrelationStats(sae, 2).save(path)
    with pytest.raises(InputError, match=r"s\.safetensors does not contain ShiftStats"):
        ShiftStats.load(path)
    ShiftStats(sae).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.raises(InputError, match="not a readable safetensors file"):
        ShiftStats.load(path)
    path.write_bytes(whole)
    with pytest.raises(InputError, match="statistics of 70 features, but the SAE has 71"):
        ShiftStats.load(path, make_sae(d_sae=71))
    with pytest.raises(InputError, match="cannot write"):
        ShiftStats(sae).save(tmp_path / "no" / "such" / "folder.safetensors")
    with pytest.raises(InputError):
        ShiftStats.load(tmp_path)


@pytest.mark.parametrize("name", ARRAYS)
def test_a_file_that_lacks_a_sum_is_damaged(name: str, tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    ShiftStats(make_sae()).save(path)
    arrays = load_file(path)
    del arrays[name]
    metadata = {"kind": "ShiftStats", "n_tokens": "0", "d_sae": "70", "sae_source": "x"}
    files.save_arrays(path, arrays, metadata)
    with pytest.raises(InputError, match=f"has no '{name}': it is damaged"):
        ShiftStats.load(path)


# Faults ---------------------------------------------------------------------------------------------------------------

GOOD_BASE, GOOD_OTHER = pairs(8)


def spoilt(array: np.ndarray, value: float) -> np.ndarray:
    array = array.copy()
    array[-1, -1] = value
    return array


@pytest.mark.parametrize(
    ("base", "other", "weights", "message"),
    [
        (spoilt(GOOD_BASE, np.nan), GOOD_OTHER, draws(8), "base"),
        (GOOD_BASE, spoilt(GOOD_OTHER, np.nan), draws(8), "other"),
        (GOOD_BASE, spoilt(GOOD_OTHER, -np.inf), draws(8), "other"),
        (GOOD_BASE[:, :-1], GOOD_OTHER, draws(8), "base"),
        (GOOD_BASE, GOOD_OTHER[:, :-1], draws(8), "other"),
        (GOOD_BASE, GOOD_OTHER[:-1], draws(8), "other"),
        (GOOD_BASE[0], GOOD_OTHER[0], draws(8), "base"),
        (
            GOOD_BASE.astype(complex),
            GOOD_OTHER,
            draws(8),
            r"base must be floating point, got .*complex128.*base\.real",
        ),
        (np.ma.masked_equal(GOOD_BASE, 0), GOOD_OTHER, draws(8), r"base is a masked array.*base\.filled\(0\)"),
        (GOOD_BASE, GOOD_OTHER.astype(np.int32), draws(8), "other"),
        (GOOD_BASE, GOOD_OTHER.tolist(), draws(8), "other"),
        (GOOD_BASE, torch.from_numpy(GOOD_OTHER).requires_grad_(), draws(8), r"other\.detach\(\)"),
        (GOOD_BASE, torch.from_numpy(GOOD_OTHER).to("meta"), draws(8), "other is on the device 'meta'"),
        (GOOD_BASE, torch.from_numpy(GOOD_OTHER).to_sparse(), draws(8), "other is a sparse tensor"),
        (GOOD_BASE, GOOD_OTHER, None, "row_weights must be given exactly where n_replicates > 0, and it is 5"),
        (GOOD_BASE, GOOD_OTHER, draws(7), "row_weights"),
        (GOOD_BASE, GOOD_OTHER, draws(8)[:, :4], "row_weights|weighted_sq_shift"),
        (GOOD_BASE, GOOD_OTHER, draws(8)[:, 0], "row_weights"),
        (GOOD_BASE, GOOD_OTHER, spoilt(draws(8), np.nan), "row_weights"),
        (GOOD_BASE, GOOD_OTHER, np.ma.masked_equal(draws(8), 0), "row_weights is a masked array"),
    ],
)
def test_faults_name_the_argument_and_add_nothing(put: Put, base: Any, other: Any, weights: Any, message: str) -> None:
    stats = ShiftStats(make_sae(), n_replicates=5)
    stats.update(*map(put, pairs()), draws())
    before = state(stats)
    with pytest.raises(ValueError, match=message):
        stats.update(put(base), put(other), weights)
    assert_equal(stats, before)


def test_weights_where_none_are_wanted() -> None:
    stats = ShiftStats(make_sae())
    with pytest.raises(ValueError, match="row_weights must be given exactly where n_replicates > 0, and it is 0"):
        stats.update(*pairs(), draws())
    assert stats.n_tokens == 0
    assert not stats.sum_base.any()


def test_means_and_the_top_need_tokens(put: Put, tmp_path: Path) -> None:
    stats = ShiftStats(make_sae())
    for name in ("mean_squared_shift", "mean_base", "mean_other"):
        with pytest.raises(ValueError, match="no tokens have been added yet"):
            getattr(stats, name)
    # Empty updates, merges and files have none either.
    stats.update(*map(put, pairs(0)))
    stats.save(tmp_path / "s.safetensors")
    for empty in (stats, stats + ShiftStats(make_sae()), ShiftStats.load(tmp_path / "s.safetensors")):
        with pytest.raises(InputError, match=r"^no tokens have been added yet: call update with rows first$"):
            empty.top(3)
    stats.update(*map(put, pairs(1)))
    assert len(stats.top(3)) == 3
    for n in (2.0, "3", None):
        with pytest.raises(ValueError, match="top must be a whole number of features"):
            stats.top(n)  # type: ignore[arg-type]


@pytest.mark.parametrize("n", [-1, 2.5, "3", 10**15, 2**62])
def test_numbers_of_sums_that_cannot_be(n: Any) -> None:
    with pytest.raises(InputError, match=r"^n_replicates (must be a whole number|= \d+ makes 70 x \d+ sums)"):
        ShiftStats(make_sae(), n_replicates=n)
    with pytest.raises(InputError, match=r"^n_targets (must be a whole number|= \d+ makes 70 x \d+ sums)"):
        sts_fast.CorrelationStats(make_sae(), n)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (np.ma.masked_equal([3, 4], 4), "columns is a masked array"),
        (np.array([[3, 4]]), "columns must be a 1-dimensional array of whole numbers"),
        (np.array(3), "columns must be a 1-dimensional array of whole numbers"),
        (np.array([3.0]), "columns must be a 1-dimensional array of whole numbers"),
        (np.ones(70, bool), "columns must be a 1-dimensional array of whole numbers"),
    ],
    ids=["masked", "table", "number", "floats", "mask"],
)
def test_columns_that_are_not_a_list_of_features(columns: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShiftStats(make_sae(), columns=columns)


@pytest.mark.parametrize("columns", [[3, 3], [4, 2], [-1, 2], [0, 70]])
def test_bad_columns_are_named(put: Put, columns: list[int]) -> None:
    stats = ShiftStats(make_sae(), columns=np.array(columns))
    with pytest.raises(ValueError, match="columns"):
        stats.update(*map(put, pairs()))


# The top --------------------------------------------------------------------------------------------------------------


def test_top_is_in_order_and_among_equals_by_index(put: Put) -> None:
    values = put(np.array([1.0, 3.0, 0.0, 3.0, 2.0, 0.0]))
    assert top_indices(values, 1).tolist() == [1]
    assert top_indices(values, 4).tolist() == [1, 3, 4, 0]
    assert top_indices(values, 6).tolist() == [1, 3, 4, 0, 2, 5]
    assert top_indices(values, 6).dtype == np.int64


@pytest.mark.parametrize("n", [0, -1, 7])
def test_top_of_more_than_there_are(put: Put, n: int) -> None:
    with pytest.raises(ValueError, match=f"top {n} of 6 features cannot be taken"):
        top_indices(put(np.zeros(6)), n)


def test_top_of_the_statistics(put: Put) -> None:
    sae, (base, other) = make_sae(), pairs()
    stats = ShiftStats(sae)
    stats.update(put(base), put(other))
    shift = literal(sae, base, other)["sum_sq_shift"]
    assert stats.top(10).tolist() == sorted(range(70), key=lambda j: (-shift[j], j))[:10]
