"""Arguments of the CPU ops that cannot be used: each is named, and nothing is changed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ops_problem import COUNTS, SUMS, Problem

from sts_fast.ops import _cpu

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


def misaligned(dtype: Any) -> Any:
    """Ones, two bytes beside where elements belong."""
    memory = np.zeros(N * D_IN * np.dtype(dtype).itemsize + 4, np.uint8)
    acts = memory[2:-2].view(dtype).reshape(N, D_IN)
    acts[:] = 1
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
        ({"base": np.ma.masked_equal(array(N, D_IN), 2)}, r"base is a masked array, .*: pass its filled\(\), or only"),
        ({"base": misaligned(np.float32)}, "base must be aligned to its elements: pass a copy"),
        ({"base": torch.from_numpy(misaligned(np.float32))}, "base must be aligned to its elements: pass a copy"),
        ({"other": torch.ones(N, D_IN).half()}, "other must be float32 or bfloat16, got torch.float16"),
        ({"other": torch.ones(N, D_IN, requires_grad=True)}, r"other requires grad: pass its detach\(\)"),
        ({"other": torch.ones(N, D_IN, device="meta")}, "other cannot be read through DLPack: "),
        ({"other": torch.ones(1, D_IN).expand(2**50, D_IN)}, r"other must have at most 2\^48 elements, got \[11258"),
        ({"row_weights": np.ma.masked_equal(array(N, 3, dtype=float), 2)}, "row_weights is a masked array"),
        ({"sum_base": np.ma.masked_equal(array(D_SAE, dtype=float), 2)}, "sum_base is a masked array"),
        ({"columns": np.ma.masked_equal([0, 1], 1)}, "columns is a masked array"),
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


def test_accumulators_in_the_memory_of_others_are_refused() -> None:
    memory = np.zeros(4 * D_SAE + N * D_IN)
    one, shifted, half = memory[:D_SAE], memory[D_SAE - 1 : 2 * D_SAE - 1], memory[D_SAE : 2 * D_SAE]
    message = "^sum_other lies in the memory of sum_base: pass an array of its own$"
    for other in (one, shifted):
        with pytest.raises(ValueError, match=message):
            call_shift(sum_base=one, sum_other=other)
    assert not memory.any()
    # Rows and weights too, whatever their strides.
    acts = memory[: N * D_IN].view(np.float32)[: N * D_IN].reshape(N, D_IN)
    for rows in (acts, acts[::-1], np.broadcast_to(acts[:1], (N, D_IN))):
        with pytest.raises(ValueError, match=r"^sum_sq_shift lies in the memory of other: pass"):
            call_shift(other=rows, sum_sq_shift=memory[:D_SAE])
    weights, weighted = memory[: N * 3].reshape(N, 3), memory[3 : 3 + 3 * D_SAE].reshape(D_SAE, 3)
    with pytest.raises(ValueError, match=r"^weighted_sq_shift lies in the memory of row_weights: pass"):
        call_shift(row_weights=weights, weighted_sq_shift=weighted)
    with pytest.raises(ValueError, match=r"^sum_sq_h lies in the memory of sum_h: pass"):
        _cpu.accumulate_moments(
            Problem("relu", N, D_IN, D_SAE).encoder(),
            array(N, D_IN),
            sum_h=half,
            sum_sq_h=half,
            n_fired=np.zeros(D_SAE, int),
        )
    # Neighbours do not overlap.
    call_shift(sum_base=one, sum_other=half, sum_sq_base=memory[2 * D_SAE : 3 * D_SAE])
    assert one.any()
    assert half.any()


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
