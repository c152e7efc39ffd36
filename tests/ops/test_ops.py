"""The CPU ops against literal float64 equations over dense features, written here and nowhere else.

Needs numpy and pytest only; what needs torch or hypothesis skips without them.
"""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks.exact_sums import errors

from sts_fast.ops import _cpu

ACTIVATIONS = ("relu", "jumprelu", "gated", "topk", "abstopk")
NORMS = ("layer_norm", "constant_norm_rescale")
SUMS = ("sum_sq_shift", "sum_base", "sum_other", "sum_sq_base", "sum_sq_other")
COUNTS = ("n_fired_base", "n_fired_other")
# Exact sums of integers cannot overflow float32 products; random values are compared with a margin instead.
INTEGER, REAL = "integer", "real"


def available_instruction_sets() -> list[str]:
    default, found = _cpu.instruction_set(), []
    for name in ("avx512", "avx2", "portable"):
        try:
            _cpu.set_instruction_set(name)
        except ValueError:
            continue
        found.append(name)
    _cpu.set_instruction_set(default)
    return found


INSTRUCTION_SETS = available_instruction_sets()


@pytest.fixture(autouse=True)
def defaults_restored() -> Iterator[None]:
    threads, name = _cpu.get_num_threads(), _cpu.instruction_set()
    yield
    _cpu.set_num_threads(threads)
    _cpu.set_instruction_set(name)


class Problem:
    """A random encoder, paired rows, weights, and the features as float64 says they are."""

    def __init__(
        self,
        activation: str,
        n: int,
        d_in: int,
        d_sae: int,
        *,
        values: str = REAL,
        columns: Any = None,
        seed: int = 0,
        input_norm: str = "none",
    ) -> None:
        rng = np.random.default_rng([seed, n, d_in, d_sae, ACTIVATIONS.index(activation)])
        if values == INTEGER:

            def draw(low: int, high: int, *shape: int) -> Any:
                return rng.integers(low, high + 1, shape).astype(np.float32)

            self.base, self.other = draw(-3, 3, n, d_in), draw(-3, 3, n, d_in)
            self.W_enc, self.bias = draw(-2, 2, d_in, d_sae), draw(-9, 3, d_sae)
            self.scale, threshold, gate_bias = draw(1, 3, d_sae), draw(-2, 6, d_sae), draw(-5, 5, d_sae)
            self.weights = draw(0, 3, n, 3).astype(np.float64)
        else:

            def normal(scale: float, *shape: int) -> Any:
                return (scale * rng.standard_normal(shape)).astype(np.float32)

            self.base = normal(1, n, d_in)
            self.other = self.base + normal(0.3, n, d_in)
            self.W_enc, self.bias = normal(d_in**-0.5, d_in, d_sae), normal(0.3, d_sae)
            self.scale = (0.5 + rng.random(d_sae)).astype(np.float32)
            threshold, gate_bias = normal(0.5, d_sae), normal(0.5, d_sae)
            self.weights = rng.standard_normal((n, 3))
        self.activation, self.n, self.d_sae = activation, n, d_sae
        self.parameters: dict[str, Any] = {"scale": self.scale, "input_norm": input_norm}
        self.k = min(7, d_sae)
        if activation == "jumprelu":
            self.parameters["threshold"] = threshold
        elif activation == "gated":
            self.parameters["gate_bias"] = gate_bias
        elif activation in ("topk", "abstopk"):
            self.parameters["k"] = self.k
        self.columns = columns
        self.n_columns = d_sae if columns is None else len(columns)

    def encoder(self, W_enc: Any = None) -> _cpu.Encoder:
        W_enc = self.W_enc if W_enc is None else W_enc
        return _cpu.Encoder(W_enc, self.bias, activation=self.activation, **self.parameters)

    def features(self, acts: Any) -> tuple[Any, Any]:
        """([n, n_columns] h, how far each is from firing the other way), both float64."""
        p = self.normalised(acts) @ self.W_enc.astype(np.float64)
        pre = p * self.scale.astype(np.float64) + self.bias
        positive = np.maximum(pre, 0)
        if self.activation == "relu":
            h, margin = positive, np.full_like(pre, np.inf)  # continuous: nothing can flip
        elif self.activation == "jumprelu":
            threshold = np.maximum(self.parameters["threshold"].astype(np.float64), 0)
            h, margin = np.where(pre > threshold, pre, 0), np.abs(pre - threshold)
        elif self.activation == "gated":
            gate = p + self.parameters["gate_bias"]
            h, margin = np.where(gate > 0, positive, 0), np.abs(gate)
        else:
            size, kept = (np.abs(pre), pre) if self.activation == "abstopk" else (pre, positive)
            order = np.argsort(-size, axis=1, kind="stable")
            h = np.zeros_like(pre)
            np.put_along_axis(h, order[:, : self.k], np.take_along_axis(kept, order[:, : self.k], 1), 1)
            ranked = np.take_along_axis(size, order, 1)
            kth = ranked[:, self.k - 1 : self.k]
            following = ranked[:, self.k : self.k + 1] if self.k < self.d_sae else np.full_like(kth, -np.inf)
            margin = np.where(h != 0, size - following, np.where(size >= kth, np.inf, kth - size))
        if self.columns is not None:
            h, margin = h[:, self.columns], margin[:, self.columns]
        return h, margin

    def normalised(self, acts: Any) -> Any:
        x = acts.astype(np.float64)
        if self.parameters["input_norm"] == "layer_norm":
            return (x - x.mean(1, keepdims=True)) / (x.std(1, ddof=1, keepdims=True) + 1e-5)
        if self.parameters["input_norm"] == "constant_norm_rescale":
            return x * np.sqrt(x.shape[1]) / np.linalg.norm(x, axis=1, keepdims=True)
        return x

    def shift(self, encoder: _cpu.Encoder | None = None, parts: Any = (None,), **chosen: Any) -> dict[str, Any]:
        """All outputs of accumulate_shift, over the rows in the given slices."""
        sums: dict[str, Any] = {name: np.zeros(self.n_columns) for name in SUMS}
        sums |= {name: np.zeros(self.n_columns, np.int64) for name in COUNTS}
        sums["weighted_sq_shift"] = np.zeros((self.n_columns, self.weights.shape[1]))
        for part in parts:
            rows = slice(None) if part is None else part
            _cpu.accumulate_shift(
                encoder or self.encoder(),
                chosen.get("base", self.base)[rows],
                chosen.get("other", self.other)[rows],
                columns=self.columns,
                row_weights=self.weights[rows],
                **sums,
            )
        return sums

    def moments(self, encoder: _cpu.Encoder | None = None, parts: Any = (None,)) -> dict[str, Any]:
        sums: dict[str, Any] = {"sum_h": np.zeros(self.n_columns), "sum_sq_h": np.zeros(self.n_columns)}
        sums |= {"n_fired": np.zeros(self.n_columns, np.int64), "sum_hy": np.zeros((self.n_columns, 3))}
        for part in parts:
            rows = slice(None) if part is None else part
            _cpu.accumulate_moments(
                encoder or self.encoder(), self.base[rows], self.weights[rows], columns=self.columns, **sums
            )
        return sums

    def wanted_shift(self) -> dict[str, Any]:
        (a, _), (b, _) = self.features(self.base), self.features(self.other)
        square = (b - a) ** 2
        return {
            "sum_sq_shift": square.sum(0),
            "sum_base": a.sum(0),
            "sum_other": b.sum(0),
            "sum_sq_base": (a**2).sum(0),
            "sum_sq_other": (b**2).sum(0),
            "n_fired_base": (a != 0).sum(0),
            "n_fired_other": (b != 0).sum(0),
            "weighted_sq_shift": square.T @ self.weights,
        }

    def wanted_moments(self) -> dict[str, Any]:
        h, _ = self.features(self.base)
        return {
            "sum_h": h.sum(0),
            "sum_sq_h": (h**2).sum(0),
            "n_fired": (h != 0).sum(0),
            "sum_hy": h.T @ self.weights,
        }


def assert_same(got: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name in wanted:
        np.testing.assert_array_equal(got[name], wanted[name], err_msg=name, strict=True)


def assert_exact(got: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name in wanted:
        np.testing.assert_array_equal(got[name], wanted[name], err_msg=name)


def assert_close(problem: Problem, got: dict[str, Any], wanted: dict[str, Any], members: tuple[Any, ...]) -> None:
    """To 1e-5 of each column's own size, or of one feature of size 1 where the column has less.

    Columns in which a firing lies within rounding of flipping are left out.
    """
    scale, firm = np.zeros(problem.n_columns), np.ones(problem.n_columns, bool)
    positive_firm = np.ones(problem.n_columns, bool)
    for acts in members:
        h, margin = problem.features(acts)
        firm &= (margin > 1e-5).all(0)
        positive_firm &= (~((h != 0) & (np.abs(h) < 1e-5))).all(0)
        scale += (h**2).sum(0) + np.abs(h).sum(0)
    assert problem.n == 0 or firm.mean() > 0.5, "the margin left too little to compare"
    for name, value in wanted.items():
        if name.startswith("n_fired"):
            # relu's own edge at 0 moves a count, though no sum.
            sure = firm & positive_firm & count_is_firm(problem, members)
            np.testing.assert_array_equal(got[name][sure], value[sure], err_msg=name)
            continue
        weight = np.abs(problem.weights).max(initial=0) if value.ndim == 2 else 1
        size = np.maximum(scale, 1)
        allowed = 1e-5 * weight * (size if value.ndim == 1 else size[:, None])
        off = np.abs(got[name] - value) > allowed
        assert not off[firm].any(), f"{name}: {np.abs(got[name] - value)[firm].max()}"


def count_is_firm(problem: Problem, members: tuple[Any, ...]) -> Any:
    firm = np.ones(problem.n_columns, bool)
    for acts in members:
        pre = problem.normalised(acts) @ problem.W_enc.astype(np.float64) * problem.scale + problem.bias
        pre = pre if problem.columns is None else pre[:, problem.columns]
        firm &= (np.abs(pre) > 1e-5).all(0)
    return firm


def some_columns(d_sae: int) -> Any:
    return np.arange(0, d_sae, 3)


SHAPES = [
    (0, 7, 5),
    (1, 1, 1),
    (1, 129, 1000),
    (5, 64, 64),
    (5, 7, 1000),
    (37, 64, 5),
    (37, 129, 64),
    (37, 300, 1000),
    (1030, 1, 64),
    (1030, 7, 5),
    (1030, 64, 1000),
    (1030, 129, 1),
]


@pytest.mark.parametrize("subset", [False, True], ids=["all", "subset"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
class TestAgainstFloat64:
    def problem(self, activation: str, shape: tuple[int, int, int], subset: bool, **kind: Any) -> Problem:
        return Problem(activation, *shape, columns=some_columns(shape[2]) if subset else None, **kind)

    def test_real_values(self, activation: str, shape: tuple[int, int, int], subset: bool) -> None:
        problem = self.problem(activation, shape, subset)
        assert_close(problem, problem.shift(), problem.wanted_shift(), (problem.base, problem.other))
        assert_close(problem, problem.moments(), problem.wanted_moments(), (problem.base,))

    @pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
    def test_integers_exactly_and_ties(
        self, activation: str, shape: tuple[int, int, int], subset: bool, instruction_set: str
    ) -> None:
        _cpu.set_instruction_set(instruction_set)
        problem = self.problem(activation, shape, subset, values=INTEGER)
        assert_exact(problem.shift(), problem.wanted_shift())
        assert_exact(problem.moments(), problem.wanted_moments())
        assert_sparse_is(problem, _cpu.encode_sparse(problem.encoder(), problem.base, problem.columns))


def assert_sparse_is(problem: Problem, sparse: tuple[Any, Any, Any]) -> None:
    indptr, indices, values = sparse
    h, _ = problem.features(problem.base)
    rows, columns = np.nonzero(h)
    assert (indptr.dtype, indices.dtype, values.dtype) == (np.int64, np.int32, np.float32)
    np.testing.assert_array_equal(indptr, np.r_[0, np.cumsum((h != 0).sum(1))])
    np.testing.assert_array_equal(indices, columns if problem.columns is None else problem.columns[columns])
    np.testing.assert_array_equal(values, h[rows, columns])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_sparse_rows_of_real_values_are_the_features_that_moments_sum(activation: str) -> None:
    problem = Problem(activation, 1030, 64, 1000)
    indptr, indices, values = _cpu.encode_sparse(problem.encoder(), problem.base)
    sums = problem.moments()
    np.testing.assert_array_equal(np.bincount(indices, minlength=1000), sums["n_fired"])
    total = np.zeros(1000)
    np.add.at(total, indices, values.astype(np.float64))
    np.testing.assert_array_equal(total, sums["sum_h"])
    assert (values < 0).any() if activation == "abstopk" else (values > 0).all()
    assert (values != 0).all()
    for t in range(problem.n):
        assert (np.diff(indices[indptr[t] : indptr[t + 1]]) > 0).all()


@pytest.mark.parametrize("activation", ["topk", "abstopk"])
@pytest.mark.parametrize("k", [1, 3, 64, 300, 399, 400])
def test_topk_of_any_k_with_ties(activation: str, k: int) -> None:
    problem = Problem(activation, 64, 5, 400, values=INTEGER)
    problem.k = problem.parameters["k"] = k
    assert_sparse_is(problem, _cpu.encode_sparse(problem.encoder(), problem.base))
    assert_exact(problem.shift(), problem.wanted_shift())


def test_topk_keeps_the_lower_columns_where_all_values_are_equal() -> None:
    encoder = _cpu.Encoder(np.ones((2, 5000), np.float32), np.zeros(5000, np.float32), activation="topk", k=9)
    for threads in (1, 3):
        _cpu.set_num_threads(threads)
        indptr, indices, values = _cpu.encode_sparse(encoder, np.ones((500, 2), np.float32))
        np.testing.assert_array_equal(indptr, 9 * np.arange(501))
        np.testing.assert_array_equal(indices, np.tile(np.arange(9), 500))
        assert (values == 2).all()


def test_abstopk_of_opposite_values_keeps_the_lower_column() -> None:
    bias = np.array([0, -3, 3, 2, -3, 3, 0], np.float32)
    encoder = _cpu.Encoder(np.zeros((1, 7), np.float32), bias, activation="abstopk", k=3)
    _, indices, values = _cpu.encode_sparse(encoder, np.ones((1, 1), np.float32))
    assert (indices.tolist(), values.tolist()) == ([1, 2, 4], [-3, 3, -3])
    encoder = _cpu.Encoder(np.zeros((1, 7), np.float32), bias, activation="abstopk", k=7)
    assert _cpu.encode_sparse(encoder, np.ones((1, 1), np.float32))[1].tolist() == [1, 2, 3, 4, 5]  # zeros are dropped


@pytest.mark.parametrize("subset", [False, True], ids=["all", "subset"])
@pytest.mark.parametrize("d_in", [2, 129, 300])
@pytest.mark.parametrize("input_norm", NORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_rows_are_normalised(instruction_set: str, activation: str, input_norm: str, d_in: int, subset: bool) -> None:
    _cpu.set_instruction_set(instruction_set)
    columns = some_columns(200) if subset else None
    problem = Problem(activation, 37, d_in, 200, columns=columns, input_norm=input_norm)
    # Rows of very different size, and one far from 0: they must not lose their digits.
    problem.base *= np.logspace(-3, 3, 37, dtype=np.float32)[:, None]
    problem.other += np.float32(100)
    assert_close(problem, problem.shift(), problem.wanted_shift(), (problem.base, problem.other))
    assert_close(problem, problem.moments(), problem.wanted_moments(), (problem.base,))


@pytest.mark.parametrize("input_norm", NORMS)
def test_normalised_bfloat16_rows_are_those_of_their_values(input_norm: str) -> None:
    torch = pytest.importorskip("torch")
    problem = Problem("relu", 37, 300, 100, input_norm=input_norm)
    base = torch.from_numpy(problem.base).bfloat16()
    problem.base = base.float().numpy()
    assert_same(problem.shift(base=base), problem.shift())


def test_a_row_that_cannot_be_scaled_is_named_and_changes_nothing() -> None:
    problem = Problem("relu", N, D_IN, D_SAE, input_norm="constant_norm_rescale")
    problem.other[4] = [0.0, -0.0] * (D_IN // 2)
    sums = np.ones(D_SAE)
    with pytest.raises(ValueError, match=r"^other is zero everywhere in row 4, which constant_norm_rescale cannot"):
        _cpu.accumulate_shift(problem.encoder(), problem.base, problem.other, sum_sq_shift=sums)
    assert (sums == 1).all()
    problem.other[2, 3] = np.nan
    with pytest.raises(ValueError, match=r"^acts contains a NaN or infinity at row 2, column 3"):
        _cpu.encode_sparse(problem.encoder(), problem.other)
    # Constant rows have no standard deviation either, but an epsilon stands in for it.
    problem = Problem("relu", N, D_IN, D_SAE, input_norm="layer_norm")
    problem.base[:] = 3
    assert_close(problem, problem.moments(), problem.wanted_moments(), (problem.base,))


# Rows are packed in one way, whatever activation follows.
@pytest.mark.parametrize(
    ("activation", "input_norm"),
    [*((activation, "none") for activation in ACTIVATIONS), ("relu", NORMS[0]), ("topk", NORMS[1])],
)
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_bit_identical_over_threads_and_chunks(activation: str, instruction_set: str, input_norm: str) -> None:
    _cpu.set_instruction_set(instruction_set)
    problem = Problem(activation, 5003, 300, 400, input_norm=input_norm)
    _cpu.set_num_threads(1)
    encoder = problem.encoder()
    shift, moments = problem.shift(encoder), problem.moments(encoder)
    sparse = _cpu.encode_sparse(encoder, problem.base)
    chunks = [[None], [slice(0, 1), slice(1, 2500), slice(2500, 5003)], [slice(s, s + 97) for s in range(0, 5003, 97)]]
    for threads in (1, 2, 3):
        _cpu.set_num_threads(threads)
        for parts in chunks:
            assert_same(problem.shift(encoder, parts), shift)
            assert_same(problem.moments(encoder, parts), moments)
        for got, wanted in zip(_cpu.encode_sparse(encoder, problem.base), sparse, strict=True):
            np.testing.assert_array_equal(got, wanted, strict=True)


def test_sums_of_many_rows_are_those_of_whole_numbers() -> None:
    for name, (core, single) in errors(200_000).items():
        assert core < 1e-12 < 1e-6 < single, name


def test_strides_of_more_than_two_billion_elements(tmp_path: Path) -> None:
    problem = Problem("gated", 2, 2, 70, values=INTEGER)
    far = 2**31 + 5
    # A sparse file: only the pages that are written take space.
    memory = np.memmap(tmp_path / "sparse", np.float32, "w+", shape=(far + 1000,))

    def spread(values: Any, at: int) -> Any:
        view = np.lib.stride_tricks.as_strided(memory[at:], values.shape, (4 * far, 4))
        view[:] = values
        return view

    base, W_enc = spread(problem.base, 0), spread(problem.W_enc, 100)
    assert_exact(problem.shift(problem.encoder(W_enc), base=base), problem.wanted_shift())
    transposed = np.ascontiguousarray(problem.W_enc[:, :2].T)
    columns = Problem("relu", 2, 2, 2, values=INTEGER)
    columns.W_enc = transposed.T
    strided = spread(transposed, 200).T
    assert_exact(columns.shift(columns.encoder(strided)), columns.wanted_shift())


def test_more_than_two_billion_features() -> None:
    n, d_sae = 33_000, 65_536
    W_enc = np.tile(np.array([0, 0, 0, 0, 0, 0, 0, 2], np.float32), d_sae // 8)[None]
    encoder = _cpu.Encoder(W_enc, np.zeros(d_sae, np.float32), activation="relu")
    acts = np.ones((n, 1), np.float32)
    sums, fired = [np.zeros(d_sae), np.zeros(d_sae)], np.zeros(d_sae, np.int64)
    _cpu.accumulate_moments(encoder, acts, sum_h=sums[0], sum_sq_h=sums[1], n_fired=fired)
    np.testing.assert_array_equal(sums[0], n * W_enc[0])
    np.testing.assert_array_equal(fired, n * (W_enc[0] > 0))
    W_enc[:, :-1] = 0
    indptr, indices, values = _cpu.encode_sparse(encoder, acts)
    np.testing.assert_array_equal(indptr, np.arange(n + 1))
    assert (indices == d_sae - 1).all()
    assert (values == 2).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_subset_is_bit_identical_to_the_same_columns_of_the_whole(activation: str) -> None:
    problem = Problem(activation, 200, 300, 1000)
    whole = problem.shift()
    problem.columns, problem.n_columns = np.array([0, 1, 2, 500, 501, 998, 999]), 7
    assert_same(problem.shift(), {name: value[problem.columns] for name, value in whole.items()})


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_two_halves_add_up_to_the_whole(activation: str) -> None:
    problem = Problem(activation, 1030, 64, 100, values=INTEGER)
    first, second = (problem.shift(parts=[part]) for part in (slice(0, 400), slice(400, None)))
    assert_same(problem.shift(), {name: first[name] + second[name] for name in first})


def test_without_the_optional_sums_the_rest_is_the_same() -> None:
    problem = Problem("jumprelu", 100, 64, 100)
    alone = np.zeros(100)
    _cpu.accumulate_shift(problem.encoder(), problem.base, problem.other, sum_sq_shift=alone)
    np.testing.assert_array_equal(alone, problem.shift()["sum_sq_shift"])


def test_the_same_rows_twice_have_no_shift() -> None:
    problem = Problem("relu", 100, 64, 100)
    problem.other = problem.base
    sums = problem.shift()
    assert not sums["sum_sq_shift"].any()
    assert not sums["weighted_sq_shift"].any()
    np.testing.assert_array_equal(sums["sum_base"], sums["sum_other"])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_W_enc_in_either_orientation_and_rows_of_any_stride(activation: str) -> None:
    problem = Problem(activation, 200, 129, 1000, columns=np.r_[0:200, 203:999:5])
    wanted = problem.shift()
    transposed = np.ascontiguousarray(problem.W_enc.T).T
    wide = np.zeros((129, 1100), np.float32)
    wide[:, :1000] = problem.W_enc
    for W_enc in (transposed, wide[:, :1000]):
        assert_same(problem.shift(problem.encoder(W_enc)), wanted)
    strided = np.zeros((400, 140), np.float32)
    strided[::2, 3:132] = problem.base
    assert_same(problem.shift(base=strided[::2, 3:132]), wanted)
    assert_same(problem.shift(base=np.ascontiguousarray(problem.base[::-1])[::-1]), wanted)


def test_read_only_and_memory_mapped_weights(tmp_path: Path) -> None:
    problem = Problem("relu", 20, 64, 100)
    np.save(tmp_path / "W_enc.npy", problem.W_enc)
    mapped = np.load(tmp_path / "W_enc.npy", mmap_mode="r")
    problem.base.flags.writeable = False
    assert_same(problem.shift(problem.encoder(mapped)), problem.shift())


def test_the_encoder_keeps_its_weights_alive() -> None:
    problem = Problem("relu", 20, 64, 100)
    wanted = problem.shift()
    encoder = _cpu.Encoder(problem.W_enc.copy(), problem.bias, activation="relu", scale=problem.scale)
    assert_same(problem.shift(encoder), wanted)
    assert (encoder.d_in, encoder.d_sae, encoder.activation, encoder.k) == (64, 100, "relu", 0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bfloat16(activation: str) -> None:
    torch = pytest.importorskip("torch")
    problem = Problem(activation, 200, 129, 100)
    base, other, W_enc = (torch.from_numpy(x).bfloat16() for x in (problem.base, problem.other, problem.W_enc))
    problem.base, problem.other, problem.W_enc = (x.float().numpy() for x in (base, other, W_enc))
    wanted = problem.shift()
    assert_same(problem.shift(problem.encoder(W_enc), base=base, other=other), wanted)
    assert_same(problem.shift(problem.encoder(W_enc.T.contiguous().T), base=base, other=problem.other), wanted)
    problem.columns, problem.n_columns = some_columns(100), 34
    subset = problem.shift(problem.encoder(W_enc), base=base, other=other)
    assert_same(subset, {name: value[problem.columns] for name, value in wanted.items()})


def test_torch_tensors_and_their_refusals() -> None:
    torch = pytest.importorskip("torch")
    problem = Problem("relu", 20, 64, 100)
    tensor = torch.from_numpy(problem.base)
    assert_same(problem.shift(problem.encoder(torch.from_numpy(problem.W_enc)), base=tensor), problem.shift())
    for wrong, message in (
        (tensor.clone().requires_grad_(), r"acts requires grad: pass its detach\(\)"),
        (tensor.double(), r"acts must be float32 or bfloat16, got torch\.float64"),
        (tensor.half(), r"acts must be float32 or bfloat16, got torch\.float16"),
        (tensor.to_sparse(), "acts cannot be read through DLPack"),
        (tensor.to("meta"), "acts cannot be read through DLPack"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            _cpu.encode_sparse(problem.encoder(), wrong)


def test_a_tensor_on_another_device_is_named() -> None:
    class OnCuda:
        def __dlpack_device__(self) -> tuple[int, int]:
            return (2, 0)

        def __dlpack__(self) -> Any:
            raise AssertionError("not to be asked for")

    with pytest.raises(ValueError, match=r"^acts must be on the CPU"):
        _cpu.encode_sparse(Problem("relu", 1, 2, 3).encoder(), OnCuda())


def test_borrowed_tensors_are_given_back() -> None:
    torch = pytest.importorskip("torch")
    problem = Problem("relu", 20, 64, 100)
    encoder = problem.encoder()
    for dtype in (torch.float32, torch.int32):
        memory = np.zeros((20, 64), np.float32)
        before = sys.getrefcount(memory)
        tensor = torch.from_numpy(memory).view(dtype)
        if dtype == torch.float32:
            _cpu.encode_sparse(encoder, tensor)
        else:
            with pytest.raises(ValueError, match=r"^acts must be float32"):
                _cpu.encode_sparse(encoder, tensor)
        del tensor
        assert sys.getrefcount(memory) == before


N, D_IN, D_SAE = 6, 8, 12


def call_shift(**changed: Any) -> dict[str, Any]:
    problem = Problem("relu", N, D_IN, D_SAE)
    sums: dict[str, Any] = {name: np.ones(D_SAE) for name in SUMS}
    sums |= {name: np.ones(D_SAE, np.int64) for name in COUNTS}
    sums |= {"row_weights": problem.weights, "weighted_sq_shift": np.ones((D_SAE, 3))}
    arguments = {"base": problem.base, "other": problem.other} | sums | changed
    try:
        _cpu.accumulate_shift(problem.encoder(), arguments.pop("base"), arguments.pop("other"), **arguments)
    finally:
        accumulators = {name: arguments[name] for name in (*SUMS, *COUNTS, "weighted_sq_shift")}
        call_shift.accumulators = accumulators  # type: ignore[attr-defined]
    return accumulators


def array(*shape: int, dtype: Any = np.float32) -> Any:
    return np.ones(shape, dtype)


def with_value(value: float, dtype: Any = np.float32, shape: tuple[int, int] = (N, D_IN)) -> Any:
    acts = np.ones(shape, dtype)
    acts[3, 2] = value
    return acts


def read_only(values: Any) -> Any:
    values.flags.writeable = False
    return values


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"base": array(N)}, r"base must be \[n_tokens, d_in\], got 1 dimension$"),
        ({"base": array(N, D_IN, 1)}, r"base must be \[n_tokens, d_in\], got 3 dimensions"),
        ({"base": array(N, D_IN, dtype=np.float64)}, "base must be float32 or bfloat16, got float64"),
        ({"base": array(N, D_IN, dtype=">f4")}, "base must be float32 or bfloat16, got >f4"),
        ({"base": [[1.0] * D_IN] * N}, "base must be a numpy array or a tensor that speaks DLPack, got list"),
        ({"base": array(D_IN, N).T}, "base must be contiguous within a row"),
        ({"base": array(N, 2 * D_IN)[:, ::2]}, "base must be contiguous within a row"),
        ({"other": array(N, D_IN + 1)}, "other must have d_in = 8 columns as W_enc has rows, got 9"),
        ({"other": array(N + 1, D_IN)}, r"other must have as many rows as base \(6\)"),
        ({"base": with_value(np.nan)}, "base contains a NaN or infinity at row 3, column 2; "),
        ({"other": with_value(-np.inf)}, "other contains a NaN or infinity at row 3, column 2; "),
        ({"columns": np.array([1, 1])}, "columns must be strictly increasing, but position 1 holds 1 after 1"),
        ({"columns": np.array([0, D_SAE])}, r"columns must lie in \[0, d_sae = 12\), got 12 at position 1"),
        ({"columns": np.array([-1])}, r"columns must lie in \[0, d_sae = 12\), got -1"),
        ({"columns": np.array([0.5])}, "columns must be a 1-dimensional array of integers"),
        ({"columns": np.ones((1, 1), int)}, "columns must be a 1-dimensional array of integers, got 2 dimensions"),
        ({"columns": np.array([True] * D_SAE)}, "columns must be a 1-dimensional array of integers"),
        ({"columns": np.array([0, 1])}, "sum_sq_shift must have 2 entries, got 12"),
        ({"sum_sq_shift": array(D_SAE)}, "sum_sq_shift must be a numpy array of float64, got float32"),
        ({"sum_sq_shift": [0.0] * D_SAE}, "sum_sq_shift must be a numpy array of float64, got list"),
        ({"sum_sq_shift": array(D_SAE, 1, dtype=float)}, "sum_sq_shift must have 1 dimension, got 2"),
        ({"sum_base": array(2 * D_SAE, dtype=float)[::2]}, "sum_base must be C-contiguous"),
        ({"sum_other": read_only(array(D_SAE, dtype=float))}, "sum_other must be writeable"),
        ({"sum_sq_base": array(D_SAE + 1, dtype=float)}, "sum_sq_base must have 12 entries, got 13"),
        ({"sum_sq_other": None}, "sum_base, sum_other, .* must be given all or none"),
        ({"n_fired_base": array(D_SAE, dtype=np.int32)}, "n_fired_base must be a numpy array of int64, got int32"),
        ({"n_fired_other": array(3, dtype=np.int64)}, "n_fired_other must have 12 entries, got 3"),
        ({"row_weights": None}, "row_weights and weighted_sq_shift must be given together"),
        ({"row_weights": array(N + 1, 3, dtype=float)}, r"row_weights must have one row per token \(6\), got 7"),
        ({"row_weights": array(N, 3)}, "row_weights must be a numpy array of float64, got float32"),
        ({"row_weights": array(N, dtype=float)}, r"row_weights must be \[n_tokens, K\], got 1 dimension"),
        (
            {"row_weights": with_value(np.nan, float, (N, 3))},
            "row_weights contains a NaN or infinity at row 3, column 2",
        ),
        ({"weighted_sq_shift": array(D_SAE, 4, dtype=float)}, r"weighted_sq_shift must be \[12, 3\], got \[12, 4\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_shift_names_the_argument_and_changes_nothing(changed: dict[str, Any], message: str) -> None:
    given = {name: np.array(value) for name, value in changed.items() if name in (*SUMS, *COUNTS)}
    with pytest.raises(ValueError, match=f"^{message}"):
        call_shift(**changed)
    for name, value in call_shift.accumulators.items():  # type: ignore[attr-defined]
        if name not in given and value is not None:
            assert (value == 1).all(), name


def test_the_accepted_call_changes_every_accumulator() -> None:
    for name, value in call_shift().items():
        assert (value != 1).any(), name


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"acts": with_value(np.inf)}, "acts contains a NaN or infinity at row 3, column 2; "),
        ({"targets": array(N - 1, 3, dtype=float)}, r"targets must have one row per token \(6\), got 5"),
        ({"targets": with_value(np.inf, float, (N, 3))}, "targets contains a NaN or infinity at row 3, column 2"),
        ({"targets": None}, "targets and sum_hy must be given together"),
        ({"sum_h": array(D_SAE)}, "sum_h must be a numpy array of float64, got float32"),
        ({"sum_sq_h": array(1, dtype=float)}, "sum_sq_h must have 12 entries, got 1"),
        ({"n_fired": array(D_SAE, dtype=float)}, "n_fired must be a numpy array of int64, got float64"),
        ({"sum_hy": array(D_SAE, dtype=float)}, "sum_hy must have 2 dimensions, got 1"),
        ({"sum_hy": array(3, D_SAE, dtype=float).T}, "sum_hy must be C-contiguous"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_moments_name_the_argument_and_change_nothing(changed: dict[str, Any], message: str) -> None:
    problem = Problem("relu", N, D_IN, D_SAE)
    arguments: dict[str, Any] = {"acts": problem.base, "targets": problem.weights}
    arguments |= {"sum_h": array(D_SAE, dtype=float), "sum_sq_h": array(D_SAE, dtype=float)}
    arguments |= {"n_fired": array(D_SAE, dtype=np.int64), "sum_hy": array(D_SAE, 3, dtype=float)}
    arguments |= changed
    with pytest.raises(ValueError, match=f"^{message}"):
        _cpu.accumulate_moments(problem.encoder(), **arguments)
    for name in ("sum_h", "sum_sq_h", "n_fired", "sum_hy"):
        assert (arguments[name] == 1).all(), name


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"W_enc": array(D_SAE)}, r"W_enc must be \[d_in, d_sae\], got 1 dimension"),
        ({"W_enc": array(D_IN, D_SAE, dtype=np.float16)}, "W_enc must be float32 or bfloat16, got float16"),
        ({"W_enc": array(2 * D_IN, 2 * D_SAE)[::2, ::2]}, "W_enc must be contiguous along its rows or its columns"),
        ({"W_enc": array(0, D_SAE)}, "W_enc must be .* with at least one row and one column"),
        ({"bias": array(D_SAE + 1)}, "bias must have 12 entries, got 13"),
        ({"bias": array(0)}, "bias must have d_sae entries, got 0"),
        ({"bias": None}, "bias must be given"),
        ({"bias": array(D_SAE, dtype=float)}, "bias must be float32 or bfloat16, got float64"),
        ({"bias": array(D_SAE) * np.float32("nan")}, "bias contains a NaN at column 0"),
        ({"scale": array(1, D_SAE)}, r"scale must be \[d_sae\], got 2 dimensions"),
        ({"threshold": None}, "threshold must be given for jumprelu"),
        ({"threshold": array(D_SAE) * np.float32("nan")}, "threshold contains a NaN at column 0"),
        ({"gate_bias": array(D_SAE)}, "gate_bias does not belong to jumprelu"),
        ({"activation": "relu"}, "threshold does not belong to relu"),
        ({"activation": "elu"}, "activation must be 'relu', 'jumprelu', 'gated', 'topk' or 'abstopk', got 'elu'"),
        ({"k": 3}, "k must be 0 for jumprelu, got 3"),
        ({"activation": "topk", "threshold": None}, r"k must lie in \[1, d_sae = 12\] for topk, got 0"),
        ({"activation": "topk", "threshold": None, "k": 13}, r"k must lie in \[1, d_sae = 12\] for topk, got 13"),
        ({"activation": "abstopk", "threshold": None}, r"k must lie in \[1, d_sae = 12\] for abstopk, got 0"),
        ({"input_norm": "rms"}, "input_norm must be 'none', 'layer_norm' or 'constant_norm_rescale', got 'rms'"),
        ({"input_norm": "layer_norm", "W_enc": array(1, D_SAE)}, "input_norm cannot be layer_norm where d_in is 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_encoder_names_the_argument(changed: dict[str, Any], message: str) -> None:
    arguments = {"W_enc": array(D_IN, D_SAE), "bias": array(D_SAE), "activation": "jumprelu"}
    arguments |= {"threshold": array(D_SAE)} | changed
    with pytest.raises(ValueError, match=f"^{message}"):
        _cpu.Encoder(**arguments)


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_nan_in_the_weights_is_found_before_anything_changes(order: Any) -> None:
    problem = Problem("relu", N, D_IN, D_SAE)
    W_enc = np.array(problem.W_enc, order=order)
    W_enc[3, 7] = np.nan
    encoder = problem.encoder(W_enc)
    sums = np.ones(D_SAE)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^W_enc contains a NaN or infinity in column 7$"):
            _cpu.accumulate_shift(encoder, problem.base, problem.other, sum_sq_shift=sums)
    assert (sums == 1).all()
    # Columns that are not used are not read.
    sums = np.zeros(3)
    _cpu.accumulate_shift(encoder, problem.base, problem.other, sum_sq_shift=sums, columns=[0, 6, 8])
    assert sums.any()


def test_threads_and_instruction_sets_are_checked() -> None:
    with pytest.raises(ValueError, match=r"^n must be at least 1 thread, got 0$"):
        _cpu.set_num_threads(0)
    with pytest.raises(ValueError, match=r"^name must be an instruction set that this machine has \(.*portable\)"):
        _cpu.set_instruction_set("mmx")
    _cpu.set_num_threads(5)
    assert _cpu.get_num_threads() == 5


def test_no_columns_and_columns_of_any_integer_type() -> None:
    problem = Problem("topk", N, D_IN, D_SAE)
    indptr, indices, _ = _cpu.encode_sparse(problem.encoder(), problem.base, np.array([], np.int64))
    np.testing.assert_array_equal(indptr, np.zeros(N + 1, np.int64))
    assert not indices.size
    wanted = _cpu.encode_sparse(problem.encoder(), problem.base, np.array([1, 4, 9]))
    for columns in (np.array([1, 4, 9], np.uint8), np.array([1, 4, 9], np.int32), np.array([1, 0, 4, 0, 9])[::2]):
        for got, want in zip(_cpu.encode_sparse(problem.encoder(), problem.base, columns), wanted, strict=True):
            np.testing.assert_array_equal(got, want)


def test_ops_run_side_by_side_in_threads() -> None:
    problem = Problem("topk", 500, 64, 1000)
    encoder, wanted, got = problem.encoder(), problem.shift(), []
    threads = [threading.Thread(target=lambda: got.append(problem.shift(encoder))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 4
    for sums in got:
        assert_same(sums, wanted)


MEMORY = """
import resource, sys
import numpy as np
from sts_fast.ops import _cpu
rng = np.random.default_rng(0)
W = rng.standard_normal((16, 128)).astype(np.float32)
acts = rng.standard_normal((10_000, 16)).astype(np.float32)
zero = np.zeros(128, np.float32)
encoders = [
    _cpu.Encoder(W, zero, activation="jumprelu", threshold=zero + 4),
    _cpu.Encoder(W, zero, activation="topk", k=8),
]
shift, sums, fired = np.zeros(128), [np.zeros(128), np.zeros(128)], np.zeros(128, np.int64)
for _ in range(int(sys.argv[1]) // 10_000):
    for encoder in encoders:
        _cpu.accumulate_shift(encoder, acts, acts[::-1], sum_sq_shift=shift)
        _cpu.accumulate_moments(encoder, acts, sum_h=sums[0], sum_sq_h=sums[1], n_fired=fired)
        _cpu.encode_sparse(encoder, acts)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux only")
def test_memory_does_not_grow_with_the_rows() -> None:
    def peak(rows: int) -> int:
        run = subprocess.run(
            [sys.executable, "-c", MEMORY, str(rows)], capture_output=True, text=True, check=True, timeout=300
        )
        return int(run.stdout)

    assert resource.RUSAGE_SELF == 0
    assert peak(1_000_000) - peak(10_000) < 8_000


@pytest.mark.skipif(shutil.which("ldd") is None, reason="needs ldd")
def test_the_extension_links_nothing_but_the_c_and_cxx_libraries() -> None:
    linked = subprocess.run(["ldd", _cpu.__file__], capture_output=True, text=True, check=True).stdout
    names = {line.split()[0].split("/")[-1].split(".so")[0] for line in linked.splitlines() if line.strip()}
    allowed = {
        "linux-vdso",
        "libstdc++",
        "libm",
        "libgcc_s",
        "libc",
        "libpthread",
        "ld-linux-x86-64",
        "ld-linux-aarch64",
    }
    assert names <= allowed, names - allowed
