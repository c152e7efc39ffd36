"""sum_by_prompt against sums over dense features in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import sts_fast
from sts_fast.ops import _cpu

D_SAE = 40
NAMES = (
    "indptr", "indices", "n_fired", "sum_h", "sum_sq_h", "sum_shift", "sum_sq_shift", "strongest", "strongest_at",
)  # fmt: skip


def features(rng: np.random.Generator, n: int, *, signed: bool = False) -> NDArray[np.float32]:
    """[n, D_SAE] mostly zero, some values equal."""
    values = rng.integers(-3 if signed else 1, 4, size=(n, D_SAE)) * (rng.random((n, D_SAE)) < 0.2)
    return (values * 0.1).astype(np.float32)


def sparse(dense: NDArray[np.float32]) -> tuple[Any, Any, Any]:
    rows, columns = np.nonzero(dense)
    indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(dense)))])
    return indptr.astype(np.int64), columns.astype(np.int32), dense[rows, columns]


def starts(sizes: list[int]) -> NDArray[np.int64]:
    return np.cumsum([0, *sizes], dtype=np.int64)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_sums_are_those_of_dense_features(signed: bool, threads: int) -> None:
    rng, before = np.random.default_rng(0), sts_fast.get_num_threads()
    sizes, pairs_of = [5, 0, 9, 1], [[0, 3, 4], [], [8, 1, 1], []]
    base, base_starts = features(rng, sum(sizes), signed=signed), starts(sizes)
    n_pairs = [len(pairs) for pairs in pairs_of]
    other = features(rng, sum(n_pairs), signed=signed)
    pair_at = np.concatenate(
        [start + np.asarray(pairs, np.int64) for start, pairs in zip(base_starts[:-1], pairs_of, strict=True)]
    )
    sts_fast.set_num_threads(threads)
    try:
        sums = _cpu.sum_by_prompt(sparse(base), base_starts, sparse(other), starts(n_pairs), pair_at, d_sae=D_SAE)
    finally:
        sts_fast.set_num_threads(before)
    found = dict(zip(NAMES, sums, strict=True))
    assert len(found["indptr"]) == 5
    wide, wide_other = base.astype(np.float64), other.astype(np.float64)
    for p in range(4):
        rows, pairs = slice(base_starts[p], base_starts[p + 1]), slice(*starts(n_pairs)[p : p + 2])
        shift = wide_other[pairs] - wide[pair_at[pairs]]
        active = (base[rows] != 0).any(axis=0) | (other[pairs] != 0).any(axis=0)
        active |= (base[pair_at[pairs]] != 0).any(axis=0)
        entries = slice(*found["indptr"][p : p + 2])
        columns = np.flatnonzero(active)
        assert found["indices"][entries].tolist() == columns.tolist()
        assert found["n_fired"][entries].tolist() == (base[rows] != 0).sum(axis=0)[columns].tolist()
        # Every sum is taken in float64 in the order of the tokens, so that nothing is rounded otherwise here.
        for name, values in (
            ("sum_h", wide[rows]), ("sum_sq_h", wide[rows] ** 2), ("sum_shift", shift), ("sum_sq_shift", shift**2)
        ):  # fmt: skip
            np.testing.assert_allclose(found[name][entries], values.sum(axis=0)[columns], rtol=1e-15, atol=1e-18)
        for entry, column in zip(range(entries.start, entries.stop), columns, strict=True):
            fires = np.flatnonzero(base[rows, column])
            strongest = base[rows, column][fires].max(initial=-np.inf)
            first = next((int(at) for at in fires if base[rows, column][at] == strongest), -1)
            assert found["strongest_at"][entry] == first
            assert found["strongest"][entry] == (strongest if len(fires) else 0)


def test_rows_of_prompts_do_not_depend_on_each_other() -> None:
    rng = np.random.default_rng(1)
    base, other = features(rng, 12), features(rng, 4)
    none = sparse(other[:0])
    pair_at = np.asarray([0, 4, 7, 11])
    both = _cpu.sum_by_prompt(sparse(base), starts([5, 7]), sparse(other), starts([2, 2]), pair_at, d_sae=D_SAE)
    one = _cpu.sum_by_prompt(sparse(base[:5]), starts([5]), sparse(other[:2]), starts([2]), pair_at[:2], d_sae=D_SAE)
    two = _cpu.sum_by_prompt(
        sparse(base[5:]), starts([7]), sparse(other[2:]), starts([2]), pair_at[2:] - 5, d_sae=D_SAE
    )
    assert both[0].tolist() == [*one[0].tolist(), *(two[0][1:] + one[0][-1]).tolist()]
    for whole, first, second in zip(both[1:], one[1:], two[1:], strict=True):
        assert np.array_equal(whole, np.concatenate([first, second]))
    nobody = _cpu.sum_by_prompt(none, starts([]), none, starts([]), pair_at[:0], d_sae=D_SAE)
    assert nobody[0].tolist() == [0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_starts": starts([3])}, "base_starts must ascend from 0 to the number of rows, 4"),
        ({"base_starts": np.asarray([0, 5, 4])}, "base_starts must ascend"),
        ({"base_starts": np.zeros(0, np.int64)}, "base_starts must have an entry for each prompt and one more"),
        ({"base_starts": np.asarray([0, 4], np.int32)}, "base_starts must be a numpy array of int64"),
        ({"other_starts": starts([1, 1])}, "other_starts"),
        ({"pair_at": np.asarray([0])}, "pair_at"),
        ({"pair_at": np.asarray([0, 4])}, "pair_at must name a row of the same prompt, which pair 1 does not"),
        ({"d_sae": 2}, "base_indices must ascend within a row and lie below d_sae, 2"),
        ({"base": (starts([2]), np.asarray([3, 3], np.int32), np.ones(2, np.float32))}, "base_indices must ascend"),
        ({"base": (starts([2]), np.asarray([3, 4], np.int32), np.ones(1, np.float32))}, "base_values"),
        ({"base": (starts([2]), np.asarray([3, 4], np.int32))}, "base must be"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    rng = np.random.default_rng(2)
    arguments = {
        "base": sparse(features(rng, 4)), "base_starts": starts([4]), "other": sparse(features(rng, 2)),
        "other_starts": starts([2]), "pair_at": np.asarray([0, 1]), "d_sae": D_SAE,
    }  # fmt: skip
    _cpu.sum_by_prompt(**arguments)
    with pytest.raises(ValueError, match=message):
        _cpu.sum_by_prompt(**{**arguments, **change})
