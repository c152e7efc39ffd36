"""The CUDA ops against the float64 equations, on a GPU and on the emulated one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_ops import ACTIVATIONS, INTEGER, Problem, assert_close, assert_exact, some_columns

from sts_fast import cuda

SUMS = ("sum_sq_shift", "sum_base", "sum_other", "sum_sq_base", "sum_sq_other")
COUNTS = ("n_fired_base", "n_fired_other")
PRECISIONS = ("bf16", "bf16x2", "fp32")


def encoder_of(problem: Problem, gpu: Any, precision: str = "fp32", W_enc: Any = None) -> cuda.Encoder:
    W_enc = problem.W_enc if W_enc is None else W_enc
    b_dec = np.zeros(W_enc.shape[0], np.float32)
    weights = cuda.prepare_weights(W_enc, b_dec, gpu, precision)
    return cuda.Encoder(
        weights,
        problem.bias,
        d_in=W_enc.shape[0],
        precision=precision,
        activation=problem.activation,
        **problem.parameters,
    )


def on(gpu: Any, values: Any) -> Any:
    return torch.from_numpy(values).to(gpu) if isinstance(values, np.ndarray) else values.to(gpu)


def shift(problem: Problem, encoder: cuda.Encoder, **chosen: Any) -> dict[str, Any]:
    gpu, n = encoder.device, problem.n_columns
    sums: dict[str, Any] = {name: torch.zeros(n, dtype=torch.float64, device=gpu) for name in SUMS}
    sums |= {name: torch.zeros(n, dtype=torch.int64, device=gpu) for name in COUNTS}
    sums["weighted_sq_shift"] = torch.zeros((n, problem.weights.shape[1]), dtype=torch.float64, device=gpu)
    base, other = (on(gpu, chosen.get(name, getattr(problem, name))) for name in ("base", "other"))
    cuda.accumulate_shift(encoder, base, other, columns=problem.columns, row_weights=problem.weights, **sums)
    return {name: values.cpu().numpy() for name, values in sums.items()}


def moments(problem: Problem, encoder: cuda.Encoder) -> dict[str, Any]:
    gpu, n = encoder.device, problem.n_columns
    sums: dict[str, Any] = {
        "sum_h": torch.zeros(n, dtype=torch.float64, device=gpu),
        "sum_sq_h": torch.zeros(n, dtype=torch.float64, device=gpu),
        "n_fired": torch.zeros(n, dtype=torch.int64, device=gpu),
        "sum_hy": torch.zeros((n, problem.weights.shape[1]), dtype=torch.float64, device=gpu),
    }
    cuda.accumulate_moments(encoder, on(gpu, problem.base), problem.weights, columns=problem.columns, **sums)
    return {name: values.cpu().numpy() for name, values in sums.items()}


def assert_sparse_is(problem: Problem, found: Any) -> None:
    indptr, indices, values = (part.cpu().numpy() for part in found)
    h, _ = problem.features(problem.base)
    rows, columns = np.nonzero(h)
    assert (indptr.dtype, indices.dtype, values.dtype) == (np.int64, np.int32, np.float32)
    np.testing.assert_array_equal(indptr, np.r_[0, np.cumsum((h != 0).sum(1))])
    np.testing.assert_array_equal(indices, columns if problem.columns is None else problem.columns[columns])
    np.testing.assert_array_equal(values, h[rows, columns])


SHAPES = [(0, 7, 5), (1, 1, 1), (5, 64, 130), (65, 7, 129), (150, 100, 40)]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("subset", [False, True], ids=["all", "subset"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_integers_exactly_and_ties(
    gpu: Any, activation: str, shape: tuple[int, int, int], subset: bool, precision: str
) -> None:
    columns = some_columns(shape[2]) if subset else None
    problem = Problem(activation, *shape, columns=columns, values=INTEGER)
    encoder = encoder_of(problem, gpu, precision)
    assert_exact(shift(problem, encoder), problem.wanted_shift())
    assert_exact(moments(problem, encoder), problem.wanted_moments())
    assert_sparse_is(problem, cuda.encode_sparse(encoder, on(gpu, problem.base), columns))
