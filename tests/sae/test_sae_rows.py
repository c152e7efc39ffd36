"""Activations in every form in which arrays come: taken with the right features, or refused with a call that works."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from exact_sae import features, make_acts, make_sae

from sts_fast import CorrelationStats, InputError, ShiftStats, encode
from sts_fast.sae.decoder import Decoder
from sts_fast.sae.rows import CONVERTED_AT_A_TIME, rows

D_IN, D_SAE = 24, 70


def dense(sparse: Any) -> np.ndarray:
    n = len(sparse.indptr) - 1
    values = np.zeros((n, D_SAE))
    values[np.repeat(np.arange(n), np.diff(sparse.indptr)), sparse.indices] = sparse.values
    return values


def packed(x: np.ndarray) -> np.ndarray:
    """Rows that are a field of records, 97 bytes apart."""
    records = np.zeros(len(x), [("flag", "i1"), ("acts", "f4", (D_IN,))])
    records["acts"] = x
    return records["acts"]


def misaligned(x: np.ndarray) -> np.ndarray:
    return np.frombuffer(b"\0" + x.tobytes(), np.float32, offset=1).reshape(x.shape)


def read_only(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


class Foreign:
    """An array of a library that only speaks DLPack."""

    def __init__(self, values: Any) -> None:
        self.values = values

    def __dlpack__(self, **options: Any) -> Any:
        return self.values.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.values.__dlpack_device__()


# The activations are whole numbers, exact in all of these dtypes.
BORROWED: dict[str, Any] = {
    "float32": lambda x: x,
    "read-only": read_only,
    "rows in reverse": lambda x: x[::-1].copy()[::-1],
    "every third row": lambda x: np.repeat(x, 3, axis=0)[::3],
    "columns 3 to 26 of wider rows": lambda x: np.hstack([x[:, :3], x, x])[:, 3 : 3 + D_IN],
    "batch, seq, d_in": lambda x: x.reshape(4, 8, D_IN),
    "batch, seq, heads, d_head": lambda x: x.reshape(2, 16, 4, 6),
    "torch": torch.from_numpy,
    "torch bfloat16": lambda x: torch.from_numpy(x).bfloat16(),
    "torch, batch, seq, d_in": lambda x: torch.from_numpy(x).reshape(8, 4, D_IN),
}
COPIED: dict[str, Any] = {
    "float16": lambda x: x.astype(np.float16),
    "float64": lambda x: x.astype(np.float64),
    "longdouble": lambda x: x.astype(np.longdouble),
    "big-endian": lambda x: x.astype(">f4"),
    "big-endian float64": lambda x: x.astype(">f8"),
    "Fortran order": np.asfortranarray,
    "float64 in Fortran order, batch, seq, d_in": lambda x: np.asfortranarray(x.reshape(4, 8, D_IN), np.float64),
    "columns in reverse": lambda x: x[:, ::-1].copy()[:, ::-1],
    "every second column": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "field of records": packed,
    "misaligned": misaligned,
    "torch float16": lambda x: torch.from_numpy(x).half(),
    "torch float64": lambda x: torch.from_numpy(x).double(),
    "torch, transposed": lambda x: torch.from_numpy(x.T.copy()).T,
    "torch bfloat16, transposed": lambda x: torch.from_numpy(x.T.copy()).bfloat16().T,
    "torch, seq, batch, d_in permuted": lambda x: torch.from_numpy(x.reshape(4, 8, D_IN)).permute(1, 0, 2),
    "torch, negated lazily": lambda x: torch._neg_view(torch.from_numpy(-x)),
    "DLPack of numpy": lambda x: Foreign(x),
    "DLPack of float64": lambda x: Foreign(x.astype(np.float64)),
    "DLPack of bfloat16": lambda x: Foreign(torch.from_numpy(x).bfloat16()),
}


@pytest.mark.parametrize("form", [*BORROWED, *COPIED])
@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
def test_forms_that_are_taken(form: str, kind: str) -> None:
    sae, acts = make_sae(kind), make_acts(32)
    h = features(sae, acts)
    if form == "torch, seq, batch, d_in permuted":
        h = h.reshape(4, 8, D_SAE).swapaxes(0, 1).reshape(32, D_SAE)
    given = (BORROWED | COPIED)[form](acts)
    assert np.array_equal(dense(encode(sae, given)), h)
    stats, moments = ShiftStats(sae, n_replicates=1), CorrelationStats(sae, 1)
    stats.update(given, make_acts(32, seed=1), np.ones((32, 1), np.float32))
    moments.update(given, torch.arange(32, dtype=torch.bfloat16)[:, None])
    assert np.array_equal(stats.sum_base, h.sum(0))
    assert np.array_equal(stats.weighted_sq_shift[:, 0], stats.sum_sq_shift)
    assert np.array_equal(moments.sum_hy[:, 0], h.T @ np.arange(32))
    assert stats.n_tokens == moments.n_tokens == 32


@pytest.mark.parametrize("form", BORROWED)
def test_rows_of_the_core_s_dtypes_are_not_copied(form: str) -> None:
    given = BORROWED[form](make_acts(32))
    taken = rows(given, D_IN)
    if isinstance(given, np.ndarray):
        assert np.shares_memory(taken, given)
    else:
        assert taken.data_ptr() == given.data_ptr()


def test_a_long_conversion_is_the_same_in_parts() -> None:
    n = 2 * CONVERTED_AT_A_TIME // D_IN + 5
    acts = np.broadcast_to(np.arange(n, dtype=np.float64)[:, None], (n, D_IN))
    taken = rows(acts, D_IN)
    assert taken.dtype == np.float32
    assert np.array_equal(taken, acts)  # whole numbers below 2^24
    spoilt = acts.copy()
    spoilt[-2, 7] = 1e39
    with pytest.raises(InputError, match=rf"^acts has 1e\+39 at row {n - 2}, column 7, which is too large for float32"):
        rows(spoilt, D_IN)


def test_rows_repeated_without_memory() -> None:
    sae, acts = make_sae(), make_acts(1)
    h = features(sae, acts)[0]
    for given in (np.broadcast_to(acts, (1000, D_IN)), torch.from_numpy(acts).expand(1000, D_IN)):
        moments = CorrelationStats(sae, 0)
        moments.update(given, np.zeros((1000, 0)))
        assert np.array_equal(moments.sum_h, 1000 * h)
    ones = np.broadcast_to(np.float32(1), (3, D_IN))
    assert np.array_equal(dense(encode(sae, ones)), features(sae, ones))


@pytest.mark.parametrize(
    "empty",
    [
        np.zeros((0, D_IN)),
        np.zeros((0, D_IN), np.float16, order="F"),
        np.zeros((2, 0, D_IN), np.float32),
        torch.zeros(0, 4, 6),
        torch.zeros(D_IN, 0).T,
    ],
    ids=["float64", "Fortran", "no seq", "heads", "transposed"],
)
def test_no_rows_in_any_form(empty: Any) -> None:
    assert encode(make_sae(), empty).indptr.tolist() == [0]


X, T = make_acts(6), torch.from_numpy(make_acts(6))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (X.astype(np.int32), r"must be floating point, got int32: if these are activations, pass acts\.astype"),
        (X > 0, r"must be floating point, got bool: .* pass acts\.astype\('float32'\)"),
        (X.astype(object), r"must be floating point, got object: .* pass acts\.astype\('float32'\)"),
        (X.astype(str), r"must be floating point, got <U32: .* pass acts\.astype\('float32'\)"),
        (X.astype(np.complex64), r"must be floating point, got complex64: .* pass acts\.real"),
        (T.int(), r"must be floating point, got torch.int32: .* pass acts\.float\(\)"),
        (T.to(torch.complex64), r"must be floating point, got torch.complex64: .* pass acts\.real"),
        (
            np.ma.masked_equal(X, 1),
            r"is a masked array, whose mask would be ignored: drop the masked rows, or pass acts\.filled\(0\)",
        ),
        (T.clone().requires_grad_(), r"requires grad, .*: pass acts\.detach\(\)"),
        (torch.nn.Parameter(T).reshape(2, 3, D_IN) * 2, r"requires grad, .*: pass acts\.detach\(\)"),
        (X.tolist(), r"must be a numpy array or a torch tensor, got list: pass numpy\.asarray\(acts, 'float32'\)"),
        (X.T, r"must be \[n_tokens, d_in\] with d_in = 24, got \[24, 6\]: pass acts\.T"),
        (T.T, r"must be \[n_tokens, d_in\] with d_in = 24, got \[24, 6\]: pass acts\.T"),
        (X[0], r"must be \[n_tokens, d_in\] with d_in = 24, got \[24\]: for one row, pass acts\[None\]"),
        (X[:, :23], r"must be .* d_in = 24, got \[6, 23\]: give the activations that this SAE reads"),
        (X.reshape(4, 6, 6), r"must be .* d_in = 24, got \[4, 6, 6\]: give the activations that this SAE reads"),
        (T.to("meta"), r"is on the device 'meta', where tensors have no values"),
        (T.to_sparse(), r"is a sparse tensor: pass acts\.to_dense\(\)"),
        (T.to(torch.float8_e4m3fn), r"is torch.float8_e4m3fn, whose scale is not known here"),
        (T[:1].expand(2**58, D_IN), r"has \d+ rows of 24 elements, which is more than 2\^48 elements"),
        (np.full((2, D_IN), 1e39), r"has 1e\+39 at row 0, column 0, which is too large for float32"),
        (np.where(X > 3, np.nan, X).astype(np.float16), r"contains a NaN or infinity at row 0, column"),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
def test_forms_that_are_refused_with_a_remedy_that_works(given: Any, message: str) -> None:
    sae = make_sae()
    with pytest.raises(ValueError, match=rf"^acts {message}") as caught:
        encode(sae, given)
    stats = ShiftStats(sae)
    with pytest.raises(ValueError, match=r"^other "):
        stats.update(X, given)
    assert stats.n_tokens == 0
    _, _, remedy = str(caught.value).partition("pass ")
    if remedy.startswith(("acts", "numpy")):
        taken = encode(sae, eval(remedy, {"acts": given, "numpy": np}))
        assert len(taken.indptr) > 1


def test_reconstruction_reads_the_same_forms() -> None:
    class Memory:
        """W_dec in memory, as the reader of files gives it."""

        def __init__(self, values: np.ndarray) -> None:
            self.values, self.shape = torch.from_numpy(values), values.shape

        def rows(self, features: Any) -> torch.Tensor:
            return self.values[torch.as_tensor(np.asarray(features, np.int64))]

    W_dec = np.random.default_rng(2).integers(-2, 3, (D_SAE, D_IN)).astype(np.float32)
    decoder: Any = Decoder(W_dec=Memory(W_dec), b_dec=np.zeros(D_IN, np.float32))  # type: ignore[arg-type]
    sae, acts = replace(make_sae(), input_norm="layer_norm", decoder=decoder), make_acts(32)
    found = encode(sae, acts)
    mean, std = acts.mean(axis=1, keepdims=True), acts.std(axis=1, ddof=1, keepdims=True)
    expected = dense(found) @ W_dec * std
    for form in (acts, acts[::-1].copy()[::-1], acts.reshape(4, 8, D_IN), acts.astype(np.float64), read_only(acts)):
        for given in (form, torch.from_numpy(form.copy())):
            np.testing.assert_allclose(sae.written(given, found), expected, rtol=1e-5, atol=1e-4)
            np.testing.assert_allclose(sae.reconstruct(given, found), expected + mean, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("W_enc", torch.nn.Parameter(torch.ones(D_IN, D_SAE)), r"W_enc requires grad.*: pass W_enc\.detach\(\)"),
        ("W_enc", torch.ones(D_IN, D_SAE, device="meta"), r"W_enc is on the device 'meta', where tensors have"),
        ("W_enc", [[1.0] * D_SAE] * D_IN, r"W_enc must be a numpy array or a torch tensor, got list"),
        (
            "b_enc",
            torch.nn.Parameter(torch.ones(D_SAE)),
            r"b_enc must be a numpy array, got Parameter: pass b_enc\.det",
        ),
        ("b_dec", torch.ones(D_IN).bfloat16(), r"b_dec must be a numpy array, got Tensor: pass b_dec\.detach"),
        ("b_dec", [0.0] * D_IN, r"b_dec must be a numpy array, got list: pass numpy\.asarray\(b_dec, 'float32'\)"),
    ],
    ids=["grad", "device", "list", "parameter", "tensor", "vector list"],
)
def test_an_sae_of_a_module_s_tensors_is_refused_with_a_call_that_works(name: str, given: Any, message: str) -> None:
    sae, acts = make_sae(), make_acts(5)
    with pytest.raises(InputError, match=f"^{message}") as caught:
        replace(sae, **{name: given})
    remedy = str(caught.value).partition("pass ")[2]
    if remedy:
        mended = replace(sae, **{name: eval(remedy, {name: given, "numpy": np})})
        assert np.array_equal(dense(encode(mended, acts)), features(mended, acts))


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (lambda W: W.astype(np.float64), r"W_enc must be float32 or bfloat16, got float64: convert it with astype"),
        (
            lambda W: torch.from_numpy(W).half(),
            r"W_enc must be float32 or bfloat16, got torch.float16: convert it with f",
        ),
        (
            lambda W: np.repeat(np.repeat(W, 2, 0), 2, 1)[::2, ::2],
            "W_enc must be contiguous along its rows or its colum",
        ),
        (lambda W: np.ma.masked_equal(W, 2), "W_enc is a masked array, whose mask would be ignored"),
    ],
    ids=["float64", "float16", "strided", "masked"],
)
def test_weights_that_the_core_does_not_read_are_named_at_first_use(form: Any, message: str) -> None:
    sae = make_sae()
    with pytest.raises(InputError, match=f"^the SAE exact standard cannot be used: {message}"):
        encode(replace(sae, W_enc=form(sae.W_enc)), make_acts(3))
