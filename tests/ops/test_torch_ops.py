"""The ops inside code that torch reads as a graph."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from exact_sae import features, make_acts, make_sae

from sts_fast import torch_handle

SUMS = ("sum_sq_shift", "sum_base", "sum_other", "sum_sq_base", "sum_sq_other")
COUNTS = ("n_fired_base", "n_fired_other")


def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.skipif(torch.__version__ < "2.10", reason="torch before 2.10 compiles no op whose result has any size")
@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
def test_ops_live_inside_a_compiled_function(kind: str) -> None:
    sae = make_sae(kind)
    handle = torch_handle(sae)
    base, other = make_acts(30), make_acts(30, seed=1)
    columns = torch.tensor([2, 3, 60])
    targets = np.random.default_rng(0).integers(0, 5, (30, 2)).astype(np.float64)
    shift: dict[str, Any] = {name: zeros(3) for name in SUMS} | {name: zeros(3, dtype=torch.int64) for name in COUNTS}
    moments: dict[str, Any] = {"sum_h": zeros(70), "sum_sq_h": zeros(70), "n_fired": zeros(70, dtype=torch.int64)}
    moments["sum_hy"] = zeros(70, 2)

    @torch.compile(fullgraph=True, backend="eager")
    def watch(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, y = x / 2, y / 2
        torch.ops.sts_fast.accumulate_shift(handle, 2 * x, 2 * y, **shift, columns=columns)
        torch.ops.sts_fast.accumulate_moments(handle, 2 * x, targets=torch.from_numpy(targets), **moments)
        indptr, indices, values = torch.ops.sts_fast.encode_sparse(handle, 2 * x)
        return indptr, indices, values.double()

    indptr, indices, values = watch(torch.from_numpy(base), torch.from_numpy(other))
    a, b = features(sae, base), features(sae, other)
    np.testing.assert_array_equal(shift["sum_sq_shift"], ((b - a) ** 2).sum(0)[columns])
    np.testing.assert_array_equal(shift["n_fired_other"], (b != 0).sum(0)[columns])
    np.testing.assert_array_equal(moments["sum_hy"], a.T @ targets)
    np.testing.assert_array_equal(indptr, np.r_[0, np.cumsum((a != 0).sum(1))])
    rows, found = np.nonzero(a)
    np.testing.assert_array_equal(indices, found)
    np.testing.assert_array_equal(values, a[rows, found])


def test_schemas_and_fakes_say_what_the_ops_do() -> None:
    sae = make_sae()
    handle, acts = torch_handle(sae), torch.from_numpy(make_acts(5))
    tests = ("test_schema", "test_faketensor")
    shift = (handle, acts, acts.flip(0), zeros(70), zeros(70), zeros(70), zeros(70), zeros(70))
    shift += (zeros(70, dtype=torch.int64), zeros(70, dtype=torch.int64), None, zeros(5, 2), zeros(70, 2))
    moments = (handle, acts, zeros(70), zeros(70), zeros(70, dtype=torch.int64))
    torch.library.opcheck(torch.ops.sts_fast.accumulate_shift.default, shift, test_utils=tests)
    torch.library.opcheck(torch.ops.sts_fast.accumulate_moments.default, moments, test_utils=tests)
    torch.library.opcheck(torch.ops.sts_fast.encode_sparse.default, (handle, acts), test_utils=tests)
    for form in (acts.half(), acts.reshape(1, 5, 24), acts.reshape(5, 4, 6), acts.T.contiguous().T):
        torch.library.opcheck(torch.ops.sts_fast.encode_sparse.default, (handle, form), test_utils=tests)
        found = torch.ops.sts_fast.encode_sparse(handle, form)
        h = features(sae, acts)
        np.testing.assert_array_equal(found[0], np.r_[0, np.cumsum((h != 0).sum(1))])
        np.testing.assert_array_equal(found[2], h[h != 0])


def test_a_handle_belongs_to_one_sae_and_ends_with_it() -> None:
    sae = make_sae()
    handle, acts = torch_handle(sae), torch.from_numpy(make_acts(5))
    other = replace(sae)
    assert torch_handle(sae) == handle != torch_handle(other)
    del sae
    with pytest.raises(ValueError, match=rf"^sae {handle} is not a number of torch_handle, or its SAE no longer"):
        torch.ops.sts_fast.encode_sparse(handle, acts)
