"""The C interface, called as C calls it."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, byref, c_char_p, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from native import ROOT, c_library, tool

HEADER = (ROOT / "csrc" / "include" / "sts" / "c_api.h").read_text(encoding="utf-8")
RELU, JUMPRELU, GATED, TOPK, ABSTOPK = range(5)
OK, INVALID_ARGUMENT = 0, 1


class Matrix(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        ("dtype", c_int32),
        *((name, c_int64) for name in ("n_rows", "n_cols", "row_stride", "col_stride")),
    )


class ShiftSums(ctypes.Structure):
    _fields_ = tuple(
        (name, c_void_p)
        for name in (
            *("sum_sq_shift", "sum_base", "sum_other", "sum_sq_base", "sum_sq_other"),
            *("n_fired_base", "n_fired_other", "weighted_sq_shift"),
        )
    )


class MomentSums(ctypes.Structure):
    _fields_ = tuple((name, c_void_p) for name in ("sum_h", "sum_sq_h", "n_fired", "sum_hy"))


def matrix(values: np.ndarray[Any, Any], **fields: Any) -> Matrix:
    row, column = (stride // 4 for stride in values.strides)
    made = Matrix(values.ctypes.data, 0, *values.shape, row, column)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def address(values: np.ndarray[Any, Any] | None) -> int | None:
    return None if values is None else values.ctypes.data


@pytest.fixture(scope="module")
def sts() -> Any:
    library = ctypes.CDLL(str(c_library()))
    library.sts_last_error.restype = c_char_p
    pointers = [c_void_p] * 4
    library.sts_encoder_create.argtypes = [POINTER(Matrix), c_int32, *pointers, c_int64, c_int32, c_void_p]
    library.sts_encode_sparse.argtypes = [c_void_p, POINTER(Matrix), c_void_p, c_int64, c_void_p]
    library.sts_accumulate_shift.argtypes = [
        *(c_void_p, POINTER(Matrix), POINTER(Matrix), c_void_p, c_int64, c_void_p, c_int64, POINTER(ShiftSums))
    ]
    library.sts_accumulate_moments.argtypes = [
        *(c_void_p, POINTER(Matrix), c_void_p, c_int64, c_void_p, c_int64, POINTER(MomentSums))
    ]
    for part, element in (("indptr", c_int64), ("indices", c_int32), ("values", ctypes.c_float)):
        function = getattr(library, f"sts_sparse_rows_{part}")
        function.argtypes, function.restype = [c_void_p], POINTER(element)
    library.sts_encoder_free.argtypes = library.sts_sparse_rows_free.argtypes = [c_void_p]
    return library


@contextmanager
def encoder(sts: Any, W_enc: Any, activation: int, vectors: list[Any], k: int = 0) -> Iterator[c_void_p]:
    handle = c_void_p()
    W = matrix(W_enc)
    status = sts.sts_encoder_create(W, activation, *map(address, vectors), k, 0, byref(handle))
    assert status == OK, sts.sts_last_error()
    yield handle
    sts.sts_encoder_free(handle)


def features(acts: Any, W_enc: Any, activation: int, vectors: list[Any], k: int) -> Any:
    """[n_tokens, d_sae] float64, by the equations of sts/sae_ops.h; of whole numbers, and so exact."""
    bias, scale, threshold, gate_bias = vectors
    p = acts.astype(np.float64) @ W_enc
    pre = scale * p + bias
    if activation == JUMPRELU:
        return np.where(pre > np.maximum(threshold, 0), pre, 0)
    if activation == GATED:
        return np.where(p + gate_bias > 0, np.maximum(pre, 0), 0)
    h = pre if activation == ABSTOPK else np.maximum(pre, 0)
    if activation in (TOPK, ABSTOPK):
        order = np.argsort(-(np.abs(pre) if activation == ABSTOPK else pre), axis=1, kind="stable")
        np.put_along_axis(h, order[:, k:], 0, axis=1)
    return h


@pytest.mark.parametrize("activation", [RELU, JUMPRELU, GATED, TOPK, ABSTOPK])
@pytest.mark.parametrize("columns", [None, np.arange(0, 40, 3)], ids=["all", "some"])
def test_ops_follow_the_equations(sts: Any, activation: int, columns: Any) -> None:
    random = np.random.default_rng(0)
    n, d_in, d_sae, n_weights, k = 23, 9, 40, 2, 0

    def whole(low: int, high: int, *shape: int) -> Any:
        return random.integers(low, high, shape).astype(np.float32)

    W_enc, base, other = whole(-2, 3, d_in, d_sae), whole(-3, 4, n, d_in), whole(-3, 4, n, d_in)
    vectors = [whole(-9, 4, d_sae), whole(1, 4, d_sae), None, None]
    if activation == JUMPRELU:
        vectors[2] = whole(-2, 7, d_sae)
    if activation == GATED:
        vectors[3] = whole(-5, 6, d_sae)
    if activation in (TOPK, ABSTOPK):
        k = 5
    weights = random.integers(0, 4, (n, n_weights)).astype(np.float64)
    picked = slice(None) if columns is None else columns
    h_a, h_b = (features(acts, W_enc, activation, vectors, k)[:, picked] for acts in (base, other))
    m, n_columns = h_a.shape[1], 0 if columns is None else len(columns)

    with encoder(sts, W_enc, activation, vectors, k) as handle:
        rows = c_void_p()
        assert sts.sts_encode_sparse(handle, matrix(base), address(columns), n_columns, byref(rows)) == OK
        indptr = np.ctypeslib.as_array(sts.sts_sparse_rows_indptr(rows), (n + 1,))
        indices = np.ctypeslib.as_array(sts.sts_sparse_rows_indices(rows), (indptr[-1],))
        values = np.ctypeslib.as_array(sts.sts_sparse_rows_values(rows), (indptr[-1],))
        where = np.nonzero(h_a)
        np.testing.assert_array_equal(np.repeat(np.arange(n), np.diff(indptr)), where[0])
        np.testing.assert_array_equal(indices, np.arange(d_sae)[picked][where[1]])
        np.testing.assert_array_equal(values, h_a[where])
        sts.sts_sparse_rows_free(rows)

        sums, counts, weighted = np.zeros((5, m)), np.zeros((2, m), np.int64), np.zeros((m, n_weights))
        places = ShiftSums(*map(address, (*sums, *counts, weighted)))
        acts = matrix(base), matrix(other)
        shift = (handle, *acts, address(columns), n_columns, address(weights), n_weights, places)
        assert sts.sts_accumulate_shift(*shift) == OK
        squares = (h_b - h_a) ** 2
        np.testing.assert_array_equal(sums, [x.sum(0) for x in (squares, h_a, h_b, h_a**2, h_b**2)])
        np.testing.assert_array_equal(counts, [np.count_nonzero(h, axis=0) for h in (h_a, h_b)])
        np.testing.assert_array_equal(weighted, squares.T @ weights)

        moments, fired, products = np.zeros((2, m)), np.zeros(m, np.int64), np.zeros((m, n_weights))
        places = MomentSums(*map(address, (*moments, fired, products)))
        given = (handle, acts[0], address(columns), n_columns, address(weights), n_weights, places)
        assert sts.sts_accumulate_moments(*given) == OK
        np.testing.assert_array_equal(moments, [h_a.sum(0), (h_a**2).sum(0)])
        np.testing.assert_array_equal(fired, np.count_nonzero(h_a, axis=0))
        np.testing.assert_array_equal(products, h_a.T @ weights)


W, BIAS = np.ones((3, 2), np.float32), np.zeros(2, np.float32)
ROWS, SUMS = np.ones((2, 3), np.float32), np.zeros(2)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"W_enc": None}, "W_enc must not be NULL"),
        ({"W_enc": matrix(W, data=None)}, "W_enc must have data, got NULL"),
        ({"W_enc": matrix(W, dtype=7)}, "W_enc must be STS_FLOAT32 or STS_BFLOAT16, got dtype 7"),
        ({"W_enc": matrix(W, n_cols=-2)}, "W_enc must have no negative size, got [3, -2]"),
        (
            {"W_enc": matrix(W, n_cols=0)},
            "W_enc must be [d_in, d_sae] with at least one row and one column, got [3, 0]",
        ),
        ({"activation": 9}, "activation must be one of sts_activation, got 9"),
        ({"activation": JUMPRELU}, "threshold must be given, got NULL"),
        ({"bias": None}, "bias must be given, got NULL"),
        ({"gate_bias": BIAS}, "gate_bias does not belong to this activation, and must be NULL"),
        ({"k": 1}, "k must be 0 but for STS_TOPK and STS_ABSTOPK, got 1"),
        ({"activation": TOPK, "k": 3}, "k must lie in [1, d_sae = 2] for topk, got 3"),
        ({"input_norm": -1}, "input_norm must be one of sts_input_norm, got -1"),
    ],
)
def test_encoder_refuses(sts: Any, given: dict[str, Any], sentence: str) -> None:
    usual = {"W_enc": matrix(W), "activation": RELU, "bias": BIAS, "scale": None, "threshold": None, "gate_bias": None}
    values = usual | {"k": 0, "input_norm": 0} | given
    handle = c_void_p(1)
    plain = [address(v) if isinstance(v, np.ndarray) else v for v in values.values()]
    assert sts.sts_encoder_create(*plain, byref(handle)) == INVALID_ARGUMENT
    assert sts.sts_last_error().decode() == sentence
    assert not handle


def test_ops_refuse(sts: Any) -> None:
    def refused(status: int, sentence: str) -> None:
        assert status == INVALID_ARGUMENT
        assert sts.sts_last_error().decode().startswith(sentence)

    rows, acts, narrow = c_void_p(), matrix(ROWS), matrix(ROWS[:, :2])
    nan = np.full((2, 3), np.nan, np.float32)
    with encoder(sts, W, RELU, [BIAS, None, None, None]) as handle:
        refused(sts.sts_encode_sparse(None, acts, None, 0, byref(rows)), "encoder must not be NULL")
        refused(sts.sts_encode_sparse(handle, acts, None, 0, None), "rows must not be NULL")
        refused(sts.sts_encode_sparse(handle, None, None, 0, byref(rows)), "acts must not be NULL")
        refused(sts.sts_encode_sparse(handle, narrow, None, 0, byref(rows)), "acts must have d_in = 3 columns")
        refused(sts.sts_encode_sparse(handle, acts, None, 2, byref(rows)), "n_columns must be 0 where columns is NULL")
        refused(sts.sts_encode_sparse(handle, matrix(nan), None, 0, byref(rows)), "acts contains a NaN or infinity")
        assert not rows
        sums = ShiftSums(sum_sq_shift=address(SUMS), sum_base=address(SUMS))
        refused(sts.sts_accumulate_shift(handle, acts, acts, None, 0, None, 0, sums), "sum_base, sum_other, ")
        sums = ShiftSums(sum_sq_shift=address(SUMS))
        refused(sts.sts_accumulate_shift(handle, acts, acts, None, 0, None, 1, None), "sums must not be NULL")
        weighted = (handle, acts, acts, None, 0, address(np.ones((2, 1))), -1, sums)
        refused(sts.sts_accumulate_shift(*weighted), "n_weights must not be negative, got -1")
        refused(sts.sts_accumulate_moments(handle, acts, None, 0, None, 0, MomentSums()), "sum_h must not be NULL")
        refused(sts.sts_set_num_threads(0), "n must be at least 1 thread, got 0")
    assert not SUMS.any()


def test_exports_what_the_header_declares(sts: Any) -> None:
    declared = re.findall(r"^STS_C_API [^;]*?(sts_\w+)\(", HEADER, re.MULTILINE)
    assert len(declared) == 12
    listed = re.findall(r"^        (sts_\w+);$", (ROOT / "csrc" / "c_api.map").read_text(), re.MULTILINE)
    assert sorted(declared) == listed
    if sys.platform == "linux":
        symbols = subprocess.run(
            [tool("nm"), "-D", "--defined-only", c_library()], capture_output=True, text=True, check=True
        ).stdout
        exported = {line.split()[-1] for line in symbols.splitlines()}
        assert exported == {f"{name}@@STS_C_1.0" for name in declared} | {"STS_C_1.0"}


def test_version_is_that_of_the_header_and_in_the_name(sts: Any) -> None:
    major, minor = (int(re.search(rf"VERSION_{part} (\d+)", HEADER)[1]) for part in ("MAJOR", "MINOR"))  # type: ignore[index]
    assert sts.sts_c_api_version() == major * 1000 + minor
    assert sts.sts_c_api_version() == 1000
    if sys.platform == "linux":
        dynamic = subprocess.run(
            [tool("readelf"), "-d", c_library()], capture_output=True, text=True, check=True
        ).stdout
        assert f"[libsts_c.so.{major}]" in dynamic
        assert Path(c_library()).name == f"libsts_c.so.{major}"
