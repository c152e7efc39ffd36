"""The CUDA ops against the float64 equations, on a GPU and, their source compiled for it, on an emulated one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exact_sae import features, make_acts, make_sae
from ops_problem import (
    ACTIVATIONS,
    INTEGER,
    NORMS,
    SUMS,
    Place,
    Problem,
    assert_all_exact,
    assert_close,
    assert_exact,
    assert_same,
    assert_sparse_exact,
    some_columns,
)
from safetensors.numpy import load_file

from sts_fast import CorrelationStats, InputError, ShiftStats, encode
from sts_fast.ops import backend, cuda, cuda_kernels


def placed(gpu: Any, precision: str = "fp32") -> Place:
    return Place(cuda, gpu, precision)


def on(gpu: Any, values: Any) -> Any:
    return placed(gpu).rows(values)


# Small whole numbers are exact in every precision, so that sums are equal and not only close. No rows; one of
# everything; ragged tiles of features, of tokens, and two strips.
@pytest.mark.parametrize(
    ("shape", "subset", "precision"),
    [
        ((0, 7, 5), False, "bf16x2"),
        ((1, 1, 1), False, "fp32"),
        ((3, 64, 130), True, "bf16"),
        ((37, 7, 129), False, "bf16x2"),
        ((70, 100, 40), False, "fp32"),
        ((70, 100, 40), True, "bf16x2"),
    ],
    ids=str,
)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_integers_exactly_and_ties(
    gpu: Any, activation: str, shape: tuple[int, int, int], subset: bool, precision: str
) -> None:
    columns = some_columns(shape[2]) if subset else None
    problem = Problem(activation, *shape, columns=columns, values=INTEGER, at=placed(gpu, precision))
    assert_all_exact(problem)


@pytest.mark.parametrize("loop", ["sm80", "sm90"])
@pytest.mark.parametrize("activation", ["gated", "topk"])
def test_either_main_loop(gpu: Any, activation: str, loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if loop == "sm90" and gpu.type == "cuda" and torch.cuda.get_device_capability(gpu) != (9, 0):
        pytest.skip("not a Hopper GPU")
    monkeypatch.setattr(cuda, "MAIN_LOOP", loop)
    problem = Problem(activation, 140, 65, 260, values=INTEGER, at=placed(gpu, "bf16x2"))
    assert_all_exact(problem)


@pytest.mark.parametrize("late", [False, True])
def test_a_block_of_many_tiles(gpu: Any, late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if late and gpu.type == "cuda":
        pytest.skip("its warps are as late as they are")
    monkeypatch.setattr(cuda, "MAIN_LOOP", "sm80")
    problem = Problem("jumprelu", 1030, 100, 8, values=INTEGER, at=placed(gpu, "bf16"))  # 17 tiles for 16 blocks
    encoder = problem.encoder()
    if late:
        cuda_kernels.load().set_order(2, warp_is_late=True)
    try:
        assert_exact(problem.shift(encoder), problem.wanted_shift())
    finally:
        if late:
            cuda_kernels.load().set_order()


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16x2", 1e-4)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_real_values(gpu: Any, activation: str, precision: str, tolerance: float) -> None:
    problem = Problem(activation, 40, 129, 150, at=placed(gpu, precision))
    encoder = problem.encoder()
    members = (problem.base, problem.other)
    found, wanted = problem.shift(encoder), problem.wanted_shift()
    firm = np.all([(problem.features(acts)[1] > 10 * tolerance).all(0) for acts in members], 0)
    assert firm.mean() > 0.4
    for name in (*SUMS, "weighted_sq_shift"):
        size = np.maximum(np.abs(wanted[name]), 1)
        assert (np.abs(found[name] - wanted[name]) <= 4 * tolerance * size)[firm].all(), name
    if precision == "fp32":
        assert_close(problem, problem.moments(encoder), problem.wanted_moments(), members[:1])


@pytest.mark.parametrize("input_norm", NORMS)
@pytest.mark.parametrize("activation", ["jumprelu", "topk"])
def test_rows_are_normalised(gpu: Any, activation: str, input_norm: str) -> None:
    problem = Problem(activation, 37, 130, 90, input_norm=input_norm, at=placed(gpu))
    problem.base[2] = 0  # stays zero
    problem.base *= np.logspace(-3, 3, 37, dtype=np.float32)[:, None]
    problem.other += np.float32(100)
    found = problem.shift()
    assert_close(problem, found, problem.wanted_shift(), (problem.base, problem.other))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_of_any_type_and_stride(gpu: Any, dtype: torch.dtype) -> None:
    problem = Problem("jumprelu", 70, 64, 40, values=INTEGER, at=placed(gpu, "bf16x2"))
    encoder = problem.encoder()
    wanted = problem.wanted_shift()
    wide = torch.full((140, 83), float("nan"), dtype=dtype)
    for offset, step, row in ((0, 80, 2), (3, 83, 1)):  # those that the products can read where they lie, and not
        rows = torch.as_strided(wide, (70, 64), (row * step, 1), offset)
        rows.copy_(torch.from_numpy(problem.other))
        assert_exact(problem.shift(encoder, base=torch.from_numpy(problem.base).to(dtype), other=rows), wanted)
        wide.fill_(float("nan"))


def test_float16_that_bfloat16_lacks(gpu: Any) -> None:
    problem = Problem("relu", 20, 24, 40, at=placed(gpu))
    base = torch.from_numpy(problem.base * np.logspace(-7, 3, 24, dtype=np.float32)).half()  # subnormal ones too
    problem.base = base.float().numpy()
    found = problem.moments(base=base)
    np.testing.assert_allclose(found["sum_h"], problem.wanted_moments()["sum_h"], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("activation", "n_weights"), [("jumprelu", 37), ("gated", 70), ("abstopk", 37)])
def test_many_blocks_of_rows_and_passes_of_weights(
    gpu: Any, activation: str, n_weights: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_kernels, "WORKSPACE_BYTES", 1)
    problem = Problem(activation, 530, 9, 20, values=INTEGER, at=placed(gpu, "bf16x2"))
    problem.weights = np.random.default_rng(0).integers(-3, 4, (530, n_weights)).astype(np.float64)
    assert_all_exact(problem)


def test_a_fault_in_any_block_is_named_and_nothing_is_added(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_kernels, "WORKSPACE_BYTES", 1)
    problem = Problem("relu", 530, 8, 12, input_norm="constant_norm_rescale", at=placed(gpu))
    encoder = problem.encoder()
    sums = torch.ones(12, dtype=torch.float64, device=gpu)

    def call() -> None:
        cuda.accumulate_shift(encoder, on(gpu, problem.base), on(gpu, problem.other), sum_sq_shift=sums)

    problem.other[400, 2] = np.nan
    with pytest.raises(ValueError, match=r"^other contains a NaN or infinity at row 400, column 2; "):
        call()
    problem.base[300, 5] = np.inf
    with pytest.raises(ValueError, match=r"^base contains a NaN or infinity at row 300, column 5; "):
        call()
    assert (sums == 1).all()
    with pytest.raises(ValueError, match=r"^acts contains a NaN or infinity at row 300, column 5; "):
        problem.sparse()


@pytest.mark.parametrize("activation", ["topk", "abstopk"])
@pytest.mark.parametrize("order", ["random", "rising"])
def test_topk_by_the_bound_of_the_first_strip(
    gpu: Any, activation: str, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "FIRST_STRIP", 50)
    problem = Problem(activation, 12, 5, 400, values=INTEGER, at=placed(gpu, "bf16"))
    if order == "rising":  # every later feature exceeds the bound: more candidates than there is room for
        problem.bias = np.arange(400, dtype=np.float32)
    assert_all_exact(problem)


@pytest.mark.parametrize("activation", ["topk", "abstopk"])
def test_a_captured_topk_loses_nothing_where_its_bound_is_passed(
    gpu: Any, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "FIRST_STRIP", 50)
    monkeypatch.setattr(cuda, "is_capturing", lambda device: True)  # then nobody can look at what a list holds
    problem = Problem(activation, 12, 5, 400, values=INTEGER, at=placed(gpu, "bf16"))
    problem.bias = np.arange(400, dtype=np.float32)
    assert_exact(problem.shift(), problem.wanted_shift())
    assert_exact(problem.moments(), problem.wanted_moments())


@pytest.mark.parametrize("columns", [None, np.array([3, 60, 61, 199])], ids=["all", "some"])
def test_topk_of_one_unusual_row_among_blocks(gpu: Any, columns: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_kernels, "WORKSPACE_BYTES", 1)
    monkeypatch.setattr(cuda, "FIRST_STRIP", 50)
    problem = Problem("topk", 270, 2, 240, values=INTEGER, columns=columns, at=placed(gpu, "bf16"))
    problem.base[:, 0] = 0
    problem.base[260, 0] = 100  # exceeds the bound of its first strip everywhere behind it
    problem.W_enc[0] = np.arange(240) >= 50
    assert_sparse_exact(problem, problem.sparse())


@pytest.mark.parametrize("k", [1, 7, 31, 32])
def test_topk_of_rows_with_many_ties(gpu: Any, k: int) -> None:
    problem = Problem("topk", 9, 3, 300, values=INTEGER, at=placed(gpu, "bf16"))
    problem.bias[:] = np.arange(300) % 2
    problem.base[0], problem.W_enc[:], problem.scale[:] = 0, np.sign(problem.W_enc), 1
    problem.base[1] = -100  # fewer than k are positive, or none
    problem.k = problem.parameters["k"] = k
    assert_sparse_exact(problem, problem.sparse())


def test_more_features_fire_than_there_is_room_for(gpu: Any) -> None:
    problem = Problem("relu", 260, 3, 300, values=INTEGER, at=placed(gpu, "bf16"))
    problem.bias += 100
    assert 260 * 300 > 1 << 16
    assert_sparse_exact(problem, problem.sparse())


@pytest.mark.parametrize("activation", ["jumprelu", "topk"])
def test_same_input_same_bits(gpu: Any, activation: str) -> None:
    problem = Problem(activation, 150, 40, 130, at=placed(gpu, "bf16x2"))
    encoder = problem.encoder()
    first = problem.shift(encoder)
    for seed in (2, 3):
        if gpu.type == "cpu":
            cuda_kernels.load().set_order(seed)  # threads take turns in another order
        assert_same(problem.shift(encoder), first)


def test_W_enc_in_either_orientation_and_type(gpu: Any) -> None:
    problem = Problem("jumprelu", 20, 60, 40, values=INTEGER, at=placed(gpu, "bf16x2"))
    wanted = problem.wanted_shift()
    W_enc = torch.from_numpy(problem.W_enc)
    problem.W_enc.flags.writeable = False
    for given in (problem.W_enc, W_enc, W_enc.T.contiguous().T, W_enc.bfloat16()):
        assert_exact(problem.shift(problem.encoder(given)), wanted)
    broken = problem.W_enc.copy()
    broken[3, 7] = np.nan
    with pytest.raises(ValueError, match=r"^W_enc contains a NaN or infinity in column 7$"):
        problem.encoder(broken)


@pytest.mark.parametrize("kind", ["standard", "jumprelu", "gated", "topk, rescaled"])
def test_statistics_stay_where_the_rows_are_and_save_the_same_file(rows_on: Any, kind: str, tmp_path: Path) -> None:
    sae, base, other = make_sae(kind), make_acts(60), make_acts(60, seed=1)
    weights = np.random.default_rng(0).integers(0, 3, (60, 2)).astype(np.float64)
    stats = [ShiftStats(sae, n_replicates=2) for _ in range(3)]
    for device, place in enumerate((lambda acts: acts, rows_on)):
        stats[device].update(place(base), place(other), weights)
    stats[2].update(rows_on(base[:40]), rows_on(other[:40]), weights[:40])
    stats[2].update(base[40:], other[40:], weights[40:])  # and go on elsewhere
    for i, one in enumerate(stats):
        one.save(tmp_path / f"{i}.safetensors")
        assert one.top(20).tolist() == stats[0].top(20).tolist()
    saved = [load_file(tmp_path / f"{i}.safetensors") for i in range(3)]
    for name, values in saved[0].items():
        for other_values in (saved[1][name], saved[2][name]):
            assert other_values.dtype == values.dtype
            np.testing.assert_allclose(other_values, values, rtol=1e-6, err_msg=name)
    h = features(sae, base)
    np.testing.assert_allclose((stats[1] + stats[1]).sum_base, 2 * h.sum(0), rtol=1e-6)

    correlations = [CorrelationStats(sae, 3) for _ in range(2)]
    targets = np.random.default_rng(1).integers(0, 9, (60, 3))
    for one, place in zip(correlations, (lambda acts: acts, rows_on), strict=True):
        one.update(place(base), place(targets))
        one.save(tmp_path / "correlation.safetensors")
        np.testing.assert_allclose(one.sum_hy, h.T @ (targets - targets[0]), rtol=1e-6, atol=1e-3)

    found = encode(sae, rows_on(base), np.array([1, 5, 6]))
    assert isinstance(found.values, torch.Tensor)
    for got, wanted in zip(found.parts, encode(sae, base, np.array([1, 5, 6])).parts, strict=True):
        np.testing.assert_array_equal(got.cpu().numpy(), wanted)


@pytest.mark.parametrize("form", ["float16", "float64", "batch, seq, d_in", "column by column", "every other row"])
def test_forms_of_rows(rows_on: Any, form: str) -> None:
    sae, acts = make_sae("jumprelu"), torch.from_numpy(make_acts(32))
    given = {
        "float16": acts.half(),
        "float64": acts.double(),
        "batch, seq, d_in": acts.reshape(4, 8, -1),
        "column by column": acts.T.contiguous().T,
        "every other row": acts.repeat_interleave(2, dim=0)[::2],
    }[form]
    h, stats = features(sae, acts), ShiftStats(sae, n_replicates=1)
    stats.update(rows_on(given), rows_on(torch.zeros_like(given)), np.ones((32, 1), np.float32))
    np.testing.assert_allclose(stats.sum_base, h.sum(0), rtol=1e-6)
    assert np.array_equal(stats.n_fired_base, (h != 0).sum(0))
    np.testing.assert_array_equal(np.diff(encode(sae, rows_on(given)).on_cpu().indptr), (h != 0).sum(1))
    masked = np.ma.masked_equal([1, 5], 5)
    with pytest.raises(InputError, match=r"^columns is a masked array, whose mask would be ignored: drop"):
        encode(sae, rows_on(given.float()), masked)


def test_squares_that_float32_cannot_hold_are_named(rows_on: Any) -> None:
    sae = make_sae()
    stats, moments, acts = ShiftStats(sae), CorrelationStats(sae, 0), make_acts(8)
    large = np.zeros_like(acts)
    large[5, 0] = 1e20
    with pytest.raises(InputError, match=r"^sum_sq_shift would not be finite: features of these rows are too large"):
        stats.update(rows_on(acts), rows_on(large))
    with pytest.raises(InputError, match=r"^sum_sq_h would not be finite: features of these rows are too large"):
        moments.update(rows_on(large), np.zeros((8, 0)))
    assert (stats.n_tokens, moments.n_tokens) == (0, 0)
    assert not stats.sum_base.any()


def test_b_dec_goes_through_the_weights_as_they_are_rounded(rows_on: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Rows that are all b_dec, large: what rounding W_enc does to x W_enc must go out again with b_dec.
    sae = make_sae("standard", d_in=64)
    sae.W_enc[:] *= np.float32(1.001)
    sae.b_dec[:] = 1000
    sae.b_enc[:] = 1
    monkeypatch.setattr(backend, "_precision", "bf16")
    stats = CorrelationStats(sae, 0)
    stats.update(rows_on(np.full((4, 64), 1000, np.float32)), np.zeros((4, 0)))
    np.testing.assert_allclose(stats.sum_h, 4, rtol=1e-4)


def test_precision_is_chosen_by_name() -> None:
    sae = make_sae()
    assert backend.precision_of(sae) == "bf16x2"
    assert backend.precision_of(sae.with_dtype("bfloat16")) == "bf16"
    with pytest.raises(ValueError, match=r"^precision must be one of bf16, bf16x2, fp32, got 'fp8'"):
        backend.set_precision("fp8")
    backend.set_precision("fp32")
    try:
        assert backend.precision_of(sae) == "fp32"
    finally:
        backend.set_precision(None)
