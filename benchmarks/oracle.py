"""The equations in float64 over a sample of columns or rows, and how far a result is from them.

Activations are discontinuous: a pre-activation within the tolerance of its threshold, relative to the largest of its
row, may fall on either side. So every number is a range: [low, high] holds both cases, and is one number elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.cases import Case

Doubles = NDArray[np.float64]

BLOCK_ROWS, BLOCK_COLUMNS = 1024, 8192
N_COLUMNS, N_ROWS = 128, 16


class WrongResult(Exception):
    """A contestant computed something else than the equations."""


class Bounds(NamedTuple):
    """low <= value <= high, arrays of one shape."""

    low: Doubles
    value: Doubles
    high: Doubles


def sample(n: int, size: int = N_COLUMNS) -> NDArray[np.int64]:
    """Up to `size` of n columns or rows, ascending."""
    return np.sort(np.random.default_rng(2).permutation(n)[:size])


def hidden_pre(case: Case, acts: torch.Tensor, columns: NDArray[np.int64]) -> Doubles:
    """[n_tokens, n_columns] (x - b_dec) W_enc + b_enc."""
    W_enc = case.W_enc[:, torch.from_numpy(columns)].double()
    rows = [(block.double() - case.b_dec.double()) @ W_enc for block in acts.split(BLOCK_ROWS)]
    pre: Doubles = (torch.cat(rows) + case.b_enc[columns].double()).cpu().numpy()
    return pre


def features(case: Case, acts: torch.Tensor, columns: NDArray[np.int64]) -> Bounds:
    """[n_tokens, n_columns] features of a standard or jumprelu SAE."""
    pre = hidden_pre(case, acts, columns)
    threshold = 0.0 if case.threshold is None else case.threshold[columns].double().cpu().numpy()
    margin = case.tolerance * np.abs(pre).max(axis=1, keepdims=True)
    open_ = np.abs(pre - threshold) <= margin
    value = np.where(pre > threshold, pre, 0.0)
    return Bounds(np.where(open_, 0.0, value), value, np.where(open_, np.maximum(pre, 0) + margin, value))


def top_k_features(case: Case, acts: torch.Tensor) -> Bounds:
    """[n_tokens, d_sae] features of a topk SAE; meant for a few rows."""
    blocks = np.split(np.arange(case.size.d_sae), range(BLOCK_COLUMNS, case.size.d_sae, BLOCK_COLUMNS))
    pre = np.concatenate([hidden_pre(case, acts, columns) for columns in blocks], axis=1)
    descending = np.sort(pre, axis=1)[:, ::-1]
    k = case.sae.k
    last_in, first_out = descending[:, k - 1 : k], descending[:, k : k + 1]
    margin = case.tolerance * np.abs(pre).max(axis=1, keepdims=True)
    chosen = pre >= last_in
    open_ = np.where(chosen, pre <= first_out + margin, pre >= last_in - margin)
    value = np.where(chosen, np.maximum(pre, 0), 0.0)
    return Bounds(np.where(open_, 0.0, value), value, np.where(open_, np.maximum(pre, 0) + margin, value))


def shift_sums(base: Bounds, other: Bounds) -> dict[str, Bounds]:
    """The statistics of accumulate_shift, each [n_columns], from features [n_tokens, n_columns]."""
    smallest, largest = other.low - base.high, other.high - base.low
    same_sign = smallest * largest > 0
    squares = Bounds(
        np.where(same_sign, np.minimum(smallest**2, largest**2), 0.0),
        (other.value - base.value) ** 2,
        np.maximum(smallest**2, largest**2),
    )
    sums = {"sum_sq_shift": squares}
    for name, member in (("base", base), ("other", other)):
        sums[f"sum_{name}"] = member
        sums[f"sum_sq_{name}"] = Bounds(*(part**2 for part in member))
        sums[f"n_fired_{name}"] = fired(member)
    return {name: summed(bounds) for name, bounds in sums.items()}


def moment_sums(h: Bounds, targets: Doubles) -> dict[str, Bounds]:
    """The statistics of accumulate_moments from features [n_tokens, n_columns] and targets [n_tokens, K]."""
    # h = value + what is open; the open part times y may have either sign.
    spread = (h.high - h.low).T @ np.abs(targets)
    cross = h.value.T @ targets
    return {
        "sum_h": summed(h),
        "sum_sq_h": summed(Bounds(*(part**2 for part in h))),
        "n_fired": summed(fired(h)),
        "sum_hy": Bounds(cross - spread, cross, cross + spread),
    }


def fired(h: Bounds) -> Bounds:
    return Bounds(*((part > 0).astype(np.float64) for part in h))


def summed(bounds: Bounds) -> Bounds:
    return Bounds(*(part.sum(axis=0) for part in bounds))


def product_errors(case: Case, acts: torch.Tensor, result: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """How far x W_enc is from float64 on a sample of rows and columns, relative to the largest of them."""
    columns, rows = sample(result["hidden_pre"].shape[1]), torch.from_numpy(sample(len(acts)))
    expected = (
        (acts[rows].double() @ case.W_enc[:, result["columns"]][:, torch.from_numpy(columns)].double()).cpu().numpy()
    )
    got = result["hidden_pre"][rows][:, torch.from_numpy(columns)]
    yield "the product", error(got, Bounds(expected, expected, expected), np.abs(expected).max())


def error(got: Any, bounds: Bounds, scale: Any = None) -> float:
    """Largest distance of an entry from its range, relative to its value, or to the mean value where that is larger.

    scale: what to take it relative to instead
    """
    numbers = np.asarray(got.cpu() if isinstance(got, torch.Tensor) else got, np.float64)
    if numbers.shape != bounds.value.shape:
        raise WrongResult(f"its shape is {numbers.shape}, and {bounds.value.shape} is expected")
    size = np.abs(bounds.value)
    scale = np.maximum(size, size.mean()) if scale is None else scale
    outside = np.maximum(np.maximum(bounds.low - numbers, numbers - bounds.high), 0.0)
    return float(np.max(np.where(outside > 0, outside, 0.0) / np.maximum(scale, 1e-30), initial=0.0)) + (
        0.0 if np.isfinite(numbers).all() else np.inf
    )


def check(case: Case, contestant: str, errors: Iterator[tuple[str, float]]) -> float:
    """The largest of the errors of a contestant's results; raises WrongResult where one exceeds the tolerance.

    Peers, which sum in float32, may be off by five times as much.
    """
    largest = 0.0
    tolerance = case.tolerance * (1 if contestant.startswith("sts_fast") else 5)
    for name, relative in errors:
        if relative > tolerance:
            raise WrongResult(f"{contestant}: {name} differs from float64 by {relative:.1e}, relative")
        largest = max(largest, relative)
    return largest
