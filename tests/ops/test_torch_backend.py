"""What is of the plain torch ops alone: tiles, precisions, memory; what they compute is asked beside the core."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks import memory
from exact_sae import make_sae
from ops_problem import (
    ACTIVATIONS,
    INTEGER,
    NORMS,
    Place,
    Problem,
    assert_all_exact,
    assert_close,
    assert_same,
    some_columns,
)

from sts_fast.ops import backend, torch_backend

CPU = torch.device("cpu")


def placed(precision: str = "fp32") -> Place:
    return Place(torch_backend, CPU, precision)


# Small whole numbers are exact in every precision. No rows; one of everything; less than a group of rows; groups and a
# rest; all of them in tiles of a few features.
@pytest.mark.parametrize("workspace", [1 << 13, 1 << 16])
@pytest.mark.parametrize(
    ("shape", "subset", "precision"),
    [
        ((0, 7, 5), False, "bf16x2"),
        ((1, 1, 1), False, "fp32"),
        ((37, 7, 129), False, "bf16x2"),
        ((300, 60, 130), True, "bf16"),
        ((530, 20, 40), False, "fp32"),
        ((530, 20, 40), True, "bf16x2"),
    ],
    ids=str,
)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_tiles_add_up(
    activation: str, shape: Any, subset: bool, precision: str, workspace: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_backend, "WORKSPACE_BYTES", workspace)
    columns = some_columns(shape[2]) if subset else None
    assert_all_exact(Problem(activation, *shape, values=INTEGER, columns=columns, at=placed(precision)))


@pytest.mark.parametrize("activation", ["topk", "abstopk"])
def test_equal_values_of_several_tiles_go_to_the_lower_features(
    activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_backend, "WORKSPACE_BYTES", 1 << 13)
    problem = Problem(activation, 40, 5, 200, values=INTEGER, at=placed())
    problem.k = problem.parameters["k"] = 64
    assert_all_exact(problem)


@pytest.mark.parametrize("input_norm", ["none", *NORMS])
@pytest.mark.parametrize("activation", ["gated", "topk"])
def test_the_same_call_gives_the_same_bits(activation: str, input_norm: str) -> None:
    problem = Problem(activation, 700, 96, 300, input_norm=input_norm, at=placed())
    assert_same(problem.shift(), problem.shift())
    assert_same(problem.moments(), problem.moments())


@pytest.mark.parametrize("precision", ["bf16", "bf16x2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_bfloat16_terms(precision: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU multiplies them, with float32 products; here of the terms made float32."""
    problem = Problem("jumprelu", 300, 64, 200, at=placed(precision))
    rounded = Problem("jumprelu", 300, 64, 200)
    for name in ("base", "other", "W_enc"):
        if precision == "bf16" or (dtype == torch.bfloat16 and name != "W_enc"):
            exact = torch.from_numpy(getattr(rounded, name))
            setattr(rounded, name, exact.bfloat16().float().numpy())

    def mm(a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
        assert a.dtype == b.dtype == torch.bfloat16
        return (a.float() @ b.float()).to(out_dtype)

    base, other = (torch.from_numpy(acts).to(dtype) for acts in (problem.base, problem.other))
    monkeypatch.setattr(torch_backend, "_has_wide_products", lambda device: True)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "mm", mm)
        found = problem.shift(base=base, other=other)
    assert_close(rounded, found, rounded.wanted_shift(), (rounded.base, rounded.other))


def test_rows_of_a_late_block_that_are_not_finite_are_named_and_nothing_is_added(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch_backend, "WORKSPACE_BYTES", 1 << 12)
    problem = Problem("relu", 600, 30, 50, at=placed())
    problem.other[571, 3] = np.nan
    problem.other[590, 0] = np.inf
    total = torch.zeros(50, dtype=torch.float64)
    base, other = torch.from_numpy(problem.base), torch.from_numpy(problem.other)
    with pytest.raises(ValueError, match=r"^other contains a NaN or infinity at row 571, column 3; drop such rows"):
        torch_backend.accumulate_shift(problem.encoder(), base, other, sum_sq_shift=total)
    assert not total.any()


def test_targets_that_float32_cannot_hold_are_named() -> None:
    problem = Problem("relu", 9, 5, 7, at=placed())
    problem.weights[4, 1] = 1e39
    with pytest.raises(ValueError, match=r"row_weights contains a number beyond float32, .* at row 4, column 1"):
        problem.shift()
    problem.weights[4, 1] = np.nan
    with pytest.raises(ValueError, match="targets contains a NaN or infinity at row 4, column 1"):
        problem.moments()


def test_what_the_caller_has_set_for_torch_changes_nothing() -> None:
    problem = Problem("relu", 300, 64, 100, at=placed())
    expected = problem.shift()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert_same(problem.shift(), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from Linux")
@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk"])
def test_no_dense_features(activation: str) -> None:
    problem = Problem(activation, 4000, 32, 16384, at=placed())  # 262 MB of features
    problem.bias -= 2
    encoder = problem.encoder()
    base, other = torch.from_numpy(problem.base), torch.from_numpy(problem.other)
    total = torch.zeros(problem.d_sae, dtype=torch.float64)

    def run(n: int) -> int:
        torch_backend.accumulate_shift(encoder, base[:n], other[:n], sum_sq_shift=total)
        return sum(part.nbytes for part in torch_backend.encode_sparse(encoder, base[:n]))

    run(1000)  # what torch itself keeps
    before = memory.resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    n_bytes = run(4000)
    assert memory.resident("VmHWM") - before < torch_backend.WORKSPACE_BYTES + 3 * n_bytes


def test_devices_that_serve() -> None:
    assert backend.device_of(torch.ones(1)) is None
    assert backend.device_of(np.ones(1)) is None
    assert backend.device_of(torch.ones(1, device="meta")) == torch.device("meta")
    assert not backend.kernels_serve(torch.ones(1))


def test_weights_are_whole_where_bfloat16_has_no_wide_products() -> None:
    sae = make_sae("standard")
    assert backend.by_torch(sae, CPU).encoder.hi.dtype == torch.float32
    assert backend.by_torch(sae.with_dtype("bfloat16"), CPU).encoder.hi.dtype == torch.bfloat16
