"""Arguments of the ops on a device that cannot be used: each is named, by our kernels' ops and by torch's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ops_problem import Place, Problem

from sts_fast.ops import cuda, torch_backend


@pytest.fixture(params=[cuda, torch_backend], ids=["kernels", "torch"])
def on(request: pytest.FixtureRequest, gpu: Any) -> Place:
    return Place(request.param, gpu)


def zeros(*shape: int, dtype: Any = torch.float64) -> Any:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"base": np.zeros((6, 8), np.float32)}, "base must be a torch tensor, got ndarray"),
        ({"base": zeros(6)}, r"base must be \[n_tokens, d_in\], got 1 dimension$"),
        ({"base": zeros(6, 8)}, r"base must be float32, bfloat16 or float16, got torch\.float64"),
        ({"base": zeros(6, 8, dtype=torch.float32).requires_grad_()}, r"base requires grad: pass its detach\(\)"),
        ({"base": zeros(8, 6, dtype=torch.float32).T}, "base must be contiguous within a row"),
        ({"other": zeros(6, 9, dtype=torch.float32)}, "other must have d_in = 8 columns as W_enc has rows, got 9"),
        ({"other": zeros(7, 8, dtype=torch.float32)}, r"other must have as many rows as base \(6\), got 7"),
        ({"columns": np.array([0, 12])}, r"columns must lie in \[0, d_sae = 12\), got 12 at position 1"),
        ({"columns": np.array([1, 1])}, "columns must be strictly increasing, but position 1 holds 1 after 1"),
        ({"columns": np.array([0.5])}, "columns must be a 1-dimensional array of integers"),
        ({"sum_sq_shift": zeros(11)}, r"sum_sq_shift must have 12 entries, got \[11\]"),
        ({"sum_sq_shift": zeros(12, dtype=torch.float32)}, r"sum_sq_shift must be a tensor of torch\.float64 on"),
        ({"sum_base": zeros(12)}, "sum_base, sum_other, .* must be given all or none"),
        ({"row_weights": zeros(6, 3)}, "row_weights and weighted_sq_shift must be given together"),
        (
            {"row_weights": zeros(5, 3), "weighted_sq_shift": zeros(12, 3)},
            r"row_weights must have one row per token \(6\), got 5",
        ),
        (
            {"row_weights": zeros(6, 3) / 0, "weighted_sq_shift": zeros(12, 3)},
            "row_weights contains a NaN or infinity at row 0, column 0",
        ),
        (
            {"row_weights": zeros(6, 3), "weighted_sq_shift": zeros(12, 2)},
            r"weighted_sq_shift must be \[12, 3\] and contiguous, got \[12, 2\]",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_argument_at_fault_is_named(on: Place, changed: dict[str, Any], message: str) -> None:
    problem = Problem("relu", 6, 8, 12, at=on)
    arguments = {"base": on.rows(problem.base), "other": on.rows(problem.other), "sum_sq_shift": on.zeros(12)}
    arguments |= {
        k: v.to(on.device) if isinstance(v, torch.Tensor) and not v.requires_grad else v for k, v in changed.items()
    }
    with pytest.raises(ValueError, match=f"^{message}"):
        on.ops.accumulate_shift(problem.encoder(), **arguments)


def test_accumulators_that_share_memory_are_refused(on: Place) -> None:
    problem, memory = Problem("relu", 6, 8, 12, at=on), torch.zeros(24, dtype=torch.float64, device=on.device)
    encoder, fired = problem.encoder(), torch.zeros(12, dtype=torch.int64, device=on.device)
    with pytest.raises(ValueError, match=r"^sum_sq_h lies in the memory of sum_h: pass a tensor of its own$"):
        on.ops.accumulate_moments(
            encoder, on.rows(problem.base), sum_h=memory[:12], sum_sq_h=memory[11:23], n_fired=fired
        )
    assert not memory.any()
    on.ops.accumulate_moments(encoder, on.rows(problem.base), sum_h=memory[:12], sum_sq_h=memory[12:], n_fired=fired)
    assert memory.any()


def test_more_rows_than_keys_can_count(on: Place) -> None:
    problem = Problem("relu", 1, 8, 12, at=on)
    rows = on.rows(problem.base).expand(2**31, 8)
    with pytest.raises(ValueError, match=r"^acts must have fewer than 2\^31 rows in one call, got 2147483648: pass"):
        on.ops.encode_sparse(problem.encoder(), rows)
