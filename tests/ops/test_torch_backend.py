"""The ops in plain torch against the float64 equations, on the CPU as on any device without our kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks import memory
from exact_sae import KINDS, make_acts, make_sae
from ops_problem import (
    ACTIVATIONS,
    INTEGER,
    NORMS,
    Problem,
    assert_close,
    assert_exact,
    assert_same,
    assert_sparse_exact,
    some_columns,
)

from sts_fast import CorrelationStats, ShiftStats, encode
from sts_fast.ops import backend, torch_backend
from sts_fast.ops.device_encoder import Encoder, prepare_weights

CPU = torch.device("cpu")
SUMS = ("sum_sq_shift", "sum_base", "sum_other", "sum_sq_base", "sum_sq_other")
COUNTS = ("n_fired_base", "n_fired_other")


def encoder_of(problem: Problem, precision: str = "fp32") -> Encoder:
    weights = prepare_weights(problem.W_enc, np.zeros(len(problem.W_enc), np.float32), CPU, precision)
    given = problem.parameters | {"d_in": len(problem.W_enc), "precision": precision, "activation": problem.activation}
    return Encoder(weights, problem.bias, **given)


def shift(problem: Problem, encoder: Encoder, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    sums: dict[str, Any] = {name: torch.zeros(problem.n_columns, dtype=torch.float64) for name in SUMS}
    sums |= {name: torch.zeros(problem.n_columns, dtype=torch.int64) for name in COUNTS}
    sums["weighted_sq_shift"] = torch.zeros((problem.n_columns, problem.weights.shape[1]), dtype=torch.float64)
    base, other = (torch.from_numpy(acts).to(dtype) for acts in (problem.base, problem.other))
    torch_backend.accumulate_shift(encoder, base, other, columns=problem.columns, row_weights=problem.weights, **sums)
    return {name: values.numpy() for name, values in sums.items()}


def moments(problem: Problem, encoder: Encoder) -> dict[str, Any]:
    sums: dict[str, Any] = {name: torch.zeros(problem.n_columns, dtype=torch.float64) for name in ("sum_h", "sum_sq_h")}
    sums["n_fired"] = torch.zeros(problem.n_columns, dtype=torch.int64)
    sums["sum_hy"] = torch.zeros((problem.n_columns, problem.weights.shape[1]), dtype=torch.float64)
    acts = torch.from_numpy(problem.base)
    torch_backend.accumulate_moments(encoder, acts, problem.weights, columns=problem.columns, **sums)
    return {name: values.numpy() for name, values in sums.items()}


def assert_all_exact(problem: Problem, encoder: Encoder) -> None:
    assert_exact(shift(problem, encoder), problem.wanted_shift())
    assert_exact(moments(problem, encoder), problem.wanted_moments())
    base = torch.from_numpy(problem.base)
    assert_sparse_exact(problem, torch_backend.encode_sparse(encoder, base, problem.columns))


# Small whole numbers are exact in every precision, and many of their values are equal. No rows; one of everything; less
# than a group of rows; groups and a rest; and tiles of a few features.
@pytest.mark.parametrize("workspace", [1 << 13, 1 << 16, 64 << 20])
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
def test_whole_numbers_are_exact(
    activation: str, shape: Any, subset: bool, precision: str, workspace: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_backend, "WORKSPACE_BYTES", workspace)
    columns = some_columns(shape[2]) if subset else None
    problem = Problem(activation, *shape, values=INTEGER, columns=columns)
    assert_all_exact(problem, encoder_of(problem, precision))


@pytest.mark.parametrize("input_norm", ["none", *NORMS])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_real_numbers_are_close(activation: str, input_norm: str) -> None:
    problem = Problem(activation, 700, 96, 300, input_norm=input_norm)
    encoder = encoder_of(problem)
    found = shift(problem, encoder)
    assert_close(problem, found, problem.wanted_shift(), (problem.base, problem.other))
    assert_close(problem, moments(problem, encoder), problem.wanted_moments(), (problem.base,))
    assert_same(shift(problem, encoder), found)


@pytest.mark.parametrize("precision", ["bf16", "bf16x2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_bfloat16_terms(precision: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU multiplies them, with float32 products; here of the terms made float32."""
    problem = Problem("jumprelu", 300, 64, 200)
    rounded = Problem("jumprelu", 300, 64, 200)
    for name in ("base", "other", "W_enc"):
        if precision == "bf16" or (dtype == torch.bfloat16 and name != "W_enc"):
            exact = torch.from_numpy(getattr(rounded, name))
            setattr(rounded, name, exact.bfloat16().float().numpy())

    def mm(a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
        assert a.dtype == b.dtype == torch.bfloat16
        return (a.float() @ b.float()).to(out_dtype)

    encoder = encoder_of(problem, precision)
    monkeypatch.setattr(torch_backend, "_has_wide_products", lambda device: True)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "mm", mm)
        found = shift(problem, encoder, dtype)
    assert_close(rounded, found, rounded.wanted_shift(), (rounded.base, rounded.other))


@pytest.mark.parametrize("k", [1, 64, 200])
@pytest.mark.parametrize("activation", ["topk", "abstopk"])
def test_equal_values_go_to_the_lower_features(activation: str, k: int) -> None:
    problem = Problem(activation, 40, 5, 200, values=INTEGER)
    problem.k = problem.parameters["k"] = k
    assert_all_exact(problem, encoder_of(problem))


def test_rows_that_are_not_finite_are_named_and_nothing_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_backend, "WORKSPACE_BYTES", 1 << 12)
    problem = Problem("relu", 600, 30, 50)
    problem.other[571, 3] = np.nan
    problem.other[590, 0] = np.inf
    sums = {name: torch.zeros(50, dtype=torch.float64) for name in SUMS[:1]}
    base, other = torch.from_numpy(problem.base), torch.from_numpy(problem.other)
    with pytest.raises(ValueError, match=r"^other contains a NaN or infinity at row 571, column 3; drop such rows"):
        torch_backend.accumulate_shift(encoder_of(problem), base, other, **sums)
    assert not sums["sum_sq_shift"].any()
    with pytest.raises(ValueError, match="acts contains a NaN or infinity at row 571, column 3"):
        torch_backend.encode_sparse(encoder_of(problem), other)


def test_targets_that_float32_cannot_hold_are_named() -> None:
    problem = Problem("relu", 9, 5, 7)
    problem.weights[4, 1] = 1e39
    with pytest.raises(ValueError, match=r"row_weights contains a number beyond float32, .* at row 4, column 1"):
        shift(problem, encoder_of(problem))
    problem.weights[4, 1] = np.nan
    with pytest.raises(ValueError, match="targets contains a NaN or infinity at row 4, column 1"):
        moments(problem, encoder_of(problem))


def test_what_the_caller_has_set_for_torch_changes_nothing() -> None:
    problem = Problem("relu", 300, 64, 100)
    expected = shift(problem, encoder_of(problem))
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert_same(shift(problem, encoder_of(problem)), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from Linux")
@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk"])
def test_no_dense_features(activation: str) -> None:
    problem = Problem(activation, 4000, 32, 16384)  # 262 MB of features
    problem.bias -= 2
    encoder = encoder_of(problem)
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


# ---- through the package, with the CPU's tensors taken for those of a device without our kernels


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "device_of", lambda acts: acts.device)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("elsewhere")
def test_statistics_and_features_as_the_core_has_them(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sae = make_sae(kind)
    acts, other = (torch.from_numpy(make_acts(300, sae.d_in, seed=seed)) for seed in (1, 2))
    targets = np.random.default_rng(0).normal(size=(300, 2))

    def computed() -> tuple[ShiftStats, CorrelationStats, Any]:
        stats, correlation = ShiftStats(sae, n_replicates=2), CorrelationStats(sae, 2)
        stats.update(acts, other, np.abs(targets))
        correlation.update(acts, targets)
        return stats, correlation, encode(sae, acts)

    found = computed()
    assert all(isinstance(value, torch.Tensor) for value in found[2].parts)
    with monkeypatch.context() as patch:
        patch.setattr(backend, "device_of", lambda acts: None)
        expected = computed()
    for ours, core in zip(found[:2], expected[:2], strict=True):
        for name, values in core.arrays().items():
            scale = np.abs(values).max(initial=1e-9)
            np.testing.assert_allclose(ours.arrays()[name] / scale, values / scale, atol=1e-5, err_msg=name)
    np.testing.assert_array_equal(found[2].on_cpu().indices, expected[2].indices)
    np.testing.assert_allclose(found[2].on_cpu().values, expected[2].values, rtol=1e-4, atol=1e-5)
    assert found[0].top(3).tolist() == expected[0].top(3).tolist()


def test_devices_that_serve() -> None:
    assert backend.device_of(torch.ones(1)) is None
    assert backend.device_of(np.ones(1)) is None
    assert backend.device_of(torch.ones(1, device="meta")) == torch.device("meta")
    assert not backend.kernels_serve(torch.ones(1))


def test_weights_are_whole_where_bfloat16_has_no_wide_products() -> None:
    sae = make_sae("standard")
    assert backend.by_torch(sae, CPU).encoder.hi.dtype == torch.float32
    assert backend.by_torch(sae.with_dtype("bfloat16"), CPU).encoder.hi.dtype == torch.bfloat16
