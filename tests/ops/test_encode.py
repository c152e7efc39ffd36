"""Sparse features against float64, with numbers that are exact in float32, so that nothing may differ at all.

Rows that are `put` are encoded by the core and by the plain torch ops.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from exact_sae import KINDS, Put, features, make_acts, make_sae

from sts_fast import SparseFeatures, encode
from sts_fast.sae import SAE


def dense(sparse: SparseFeatures, d_sae: int) -> np.ndarray:
    sparse = sparse.on_cpu()
    n = len(sparse.indptr) - 1
    values = np.zeros((n, d_sae))
    values[np.repeat(np.arange(n), np.diff(sparse.indptr)), sparse.indices] = sparse.values
    return values


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_features_are_those_of_the_equations(put: Put, kind: str, apply_b_dec_to_input: bool) -> None:
    sae = replace(make_sae(kind), apply_b_dec_to_input=apply_b_dec_to_input)
    acts = make_acts(100)
    expected = features(sae, acts)
    assert 0.02 < (expected != 0).mean() < 0.5
    assert np.array_equal(dense(encode(sae, put(acts)), sae.d_sae), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_compressed(put: Put, kind: str) -> None:
    sae, acts = make_sae(kind), make_acts(50)
    found = encode(sae, put(acts)).on_cpu()
    assert (found.indptr.dtype, found.indices.dtype, found.values.dtype) == (np.int64, np.int32, np.float32)
    assert found.indptr[0] == 0
    assert np.array_equal(np.diff(found.indptr), (features(sae, acts) != 0).sum(axis=1))
    assert found.indptr[-1] == len(found.indices) == len(found.values)
    assert (found.values < 0).any() if kind == "abstopk" else (found.values > 0).all()
    for start, stop in zip(found.indptr[:-1], found.indptr[1:], strict=True):
        assert (np.diff(found.indices[start:stop]) > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_subset_of_columns_is_the_same_columns_of_all(put: Put, kind: str) -> None:
    # Of topk too: what the k-th largest value of a row is depends on all columns.
    sae, acts = make_sae(kind), make_acts(100)
    columns = np.array([0, 3, 4, 17, 40, 69])
    expected = np.zeros((100, sae.d_sae))
    expected[:, columns] = features(sae, acts)[:, columns]
    assert np.array_equal(dense(encode(sae, put(acts), columns), sae.d_sae), expected)
    assert encode(sae, put(acts), np.array([], np.int64)).indptr.tolist() == [0] * 101


FORMS: dict[str, Any] = {
    "numpy": lambda x: x,
    "numpy, every other row": lambda x: np.repeat(x, 2, axis=0)[::2],
    "numpy, part of wider rows": lambda x: np.hstack([x, x])[:, : x.shape[1]],
    "torch": torch.from_numpy,
    "torch bfloat16": lambda x: torch.from_numpy(x).bfloat16(),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_activations(put: Put, form: str) -> None:
    sae, acts = make_sae("jumprelu"), make_acts(64)
    assert np.array_equal(dense(encode(sae, put(FORMS[form](acts))), sae.d_sae), features(sae, acts))


WEIGHT_FORMS: dict[str, Any] = {
    "numpy": lambda w: w,
    "numpy, column by column": np.asfortranarray,
    "torch": torch.from_numpy,
    "torch, column by column": lambda w: torch.from_numpy(w.T.copy()).T,
    "bfloat16": lambda w: torch.from_numpy(w).bfloat16(),
    "bfloat16, column by column": lambda w: torch.from_numpy(w.T.copy()).bfloat16().T,
}


@pytest.mark.parametrize("form", WEIGHT_FORMS)
def test_forms_of_weights(put: Put, form: str) -> None:
    sae, acts = make_sae("gated"), make_acts(64)
    assert np.array_equal(
        dense(encode(replace(sae, W_enc=WEIGHT_FORMS[form](sae.W_enc)), put(acts)), sae.d_sae), features(sae, acts)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows(put: Put, kind: str) -> None:
    found = encode(make_sae(kind), put(np.zeros((0, 24), np.float32)))
    assert found.indptr.tolist() == [0]
    assert len(found.indices) == len(found.values) == 0


@pytest.mark.parametrize("form", [lambda x: x, torch.from_numpy], ids=["numpy", "torch"])
def test_heads_of_hook_z_are_joined(form: Any) -> None:
    sae, acts = make_sae(), make_acts(10)
    heads = encode(sae, form(acts.reshape(10, 4, 6)))
    assert all(np.array_equal(one, other) for one, other in zip(heads.parts, encode(sae, acts).parts, strict=True))
    assert encode(sae, form(acts[:0].reshape(0, 4, 6))).indptr.tolist() == [0]


def test_no_rows_of_numpy() -> None:
    # numpy gives an array without rows strides of 0.
    assert encode(make_sae(), np.zeros((0, 24), np.float32)).indptr.tolist() == [0]


def test_of_equal_values_topk_takes_the_lower_column(put: Put) -> None:
    sae = SAE(
        architecture="topk",
        W_enc=np.ones((2, 6), np.float32),
        b_enc=np.array([0, 1, 0, 1, 0, 1], np.float32),
        b_dec=np.zeros(2, np.float32),
        k=4,
    )
    found = encode(sae, put(np.ones((1, 2), np.float32)))
    assert found.indices.tolist() == [0, 1, 3, 5]
    assert found.values.tolist() == [2, 3, 3, 3]


def test_topk_keeps_only_what_is_positive(put: Put) -> None:
    sae = replace(make_sae("topk"), b_enc=np.full(70, -1000, np.float32))
    assert encode(sae, put(make_acts(10))).indptr.tolist() == [0] * 11


def test_jumprelu_fires_strictly_above_its_threshold_and_above_zero(put: Put) -> None:
    sae = SAE(
        architecture="jumprelu",
        W_enc=np.zeros((1, 5), np.float32),
        b_enc=np.array([2, 2, 2, -1, 0], np.float32),
        b_dec=np.zeros(1, np.float32),
        threshold=np.array([1.9999999, 2, 3, -2, -1], np.float32),
    )
    found = encode(sae, put(np.zeros((1, 1), np.float32)))
    assert (found.indices.tolist(), found.values.tolist()) == ([0], [2])


def test_bad_activations_are_named(put: Put) -> None:
    sae, acts = make_sae(), make_acts(4)
    for bad in (np.nan, np.inf, -np.inf):
        spoilt = acts.copy()
        spoilt[2, 5] = bad
        with pytest.raises(ValueError, match="acts"):
            encode(sae, put(spoilt))
    for wrong in (acts[:, :-1], acts[0], acts.astype(np.int32), acts.tolist()):
        with pytest.raises(ValueError, match="acts"):
            encode(sae, put(wrong))


@pytest.mark.parametrize("columns", [[3, 3], [4, 2], [-1, 2], [0, 70], [[1, 2]], [0.5, 1.5]])
def test_bad_columns_are_named(put: Put, columns: Any) -> None:
    with pytest.raises(ValueError, match="columns"):
        encode(make_sae(), put(make_acts(4)), np.array(columns))


@pytest.mark.parametrize("kind", ["standard", "abstopk"])
def test_features_become_matrices_of_other_libraries(kind: str) -> None:
    sae, acts = make_sae(kind), make_acts(20)
    expected, found = features(sae, acts), encode(sae, acts)
    assert len(found) == 20
    assert np.array_equal(found.to_dense(), expected)
    assert np.array_equal(found.to_scipy().toarray(), expected)
    assert np.shares_memory(found.to_scipy().data, found.values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its CSR tensors a beta
        assert np.array_equal(found.to_torch().to_dense().numpy(), expected)
    assert repr(found).startswith("SparseFeatures(20 rows of 70 features, ")
    assert encode(sae, acts[:0]).to_dense().shape == (0, 70)
