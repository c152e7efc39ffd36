"""Random problems for the native ops, with their results by literal float64 equations over dense features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sts_fast.ops import _cpu

ACTIVATIONS = ("relu", "jumprelu", "gated", "topk", "abstopk")
NORMS = ("layer_norm", "constant_norm_rescale")
SUMS = ("sum_sq_shift", "sum_base", "sum_other", "sum_sq_base", "sum_sq_other")
COUNTS = ("n_fired_base", "n_fired_other")
# Exact sums of integers cannot overflow float32 products; random values are compared with a margin instead.
INTEGER, REAL = "integer", "real"


@dataclass(frozen=True)
class Place:
    """Where problems are computed: between numpy arrays by the core, or between tensors of a device.

    ops:       a module with the functions of _cpu
    device:    of rows and sums, a torch.device; None for numpy arrays
    precision: of a device's products
    """

    ops: Any = _cpu
    device: Any = None
    precision: str = "fp32"

    @property
    def is_core(self) -> bool:
        return self.device is None

    def encoder(self, W_enc: Any, bias: Any, **given: Any) -> Any:
        if self.is_core:
            return _cpu.Encoder(W_enc, bias, **given)
        from sts_fast.ops.device_encoder import Encoder, prepare_weights

        weights = prepare_weights(W_enc, np.zeros(len(W_enc), np.float32), self.device, self.precision)
        given = {"scale": np.ones_like(bias), "d_in": len(W_enc), "precision": self.precision} | given
        return Encoder(weights, bias, **given)

    def rows(self, values: Any) -> Any:
        if self.is_core:
            return values
        import torch

        return torch.as_tensor(values).to(self.device)

    def zeros(self, *shape: int, dtype: Any = np.float64) -> Any:
        return self.rows(np.zeros(shape, dtype))

    def sparse(self, encoder: Any, acts: Any, columns: Any = None) -> tuple[Any, ...]:
        """(indptr, indices, values) as numpy arrays."""
        return tuple(map(to_numpy, self.ops.encode_sparse(encoder, self.rows(acts), columns)))


def to_numpy(values: Any) -> Any:
    return values if isinstance(values, np.ndarray) else values.cpu().numpy()


CORE = Place()


class Problem:
    """A random encoder, paired rows, weights, and the features as float64 says they are; computed `at` a place."""

    def __init__(
        self,
        activation: str,
        n: int,
        d_in: int,
        d_sae: int,
        *,
        values: str = REAL,
        columns: Any = None,
        seed: int = 0,
        input_norm: str = "none",
        at: Place = CORE,
    ) -> None:
        rng = np.random.default_rng([seed, n, d_in, d_sae, ACTIVATIONS.index(activation)])
        if values == INTEGER:

            def draw(low: int, high: int, *shape: int) -> Any:
                return rng.integers(low, high + 1, shape).astype(np.float32)

            self.base, self.other = draw(-3, 3, n, d_in), draw(-3, 3, n, d_in)
            self.W_enc, self.bias = draw(-2, 2, d_in, d_sae), draw(-9, 3, d_sae)
            self.scale, threshold, gate_bias = draw(1, 3, d_sae), draw(-2, 6, d_sae), draw(-5, 5, d_sae)
            self.weights = draw(0, 3, n, 3).astype(np.float64)
        else:

            def normal(scale: float, *shape: int) -> Any:
                return (scale * rng.standard_normal(shape)).astype(np.float32)

            self.base = normal(1, n, d_in)
            self.other = self.base + normal(0.3, n, d_in)
            self.W_enc, self.bias = normal(d_in**-0.5, d_in, d_sae), normal(0.3, d_sae)
            self.scale = (0.5 + rng.random(d_sae)).astype(np.float32)
            threshold, gate_bias = normal(0.5, d_sae), normal(0.5, d_sae)
            self.weights = rng.standard_normal((n, 3))
        self.at, self.activation, self.n, self.d_sae = at, activation, n, d_sae
        self.parameters: dict[str, Any] = {"scale": self.scale, "input_norm": input_norm}
        self.k = min(7, d_sae)
        if activation == "jumprelu":
            self.parameters["threshold"] = threshold
        elif activation == "gated":
            self.parameters["gate_bias"] = gate_bias
        elif activation in ("topk", "abstopk"):
            self.parameters["k"] = self.k
        self.columns = columns
        self.n_columns = d_sae if columns is None else len(columns)

    def encoder(self, W_enc: Any = None) -> Any:
        W_enc = self.W_enc if W_enc is None else W_enc
        return self.at.encoder(W_enc, self.bias, activation=self.activation, **self.parameters)

    def features(self, acts: Any) -> tuple[Any, Any]:
        """([n, n_columns] h, how far each is from firing the other way), both float64."""
        p = self.normalised(acts) @ self.W_enc.astype(np.float64)
        pre = p * self.scale.astype(np.float64) + self.bias
        positive = np.maximum(pre, 0)
        if self.activation == "relu":
            h, margin = positive, np.full_like(pre, np.inf)  # continuous: nothing can flip
        elif self.activation == "jumprelu":
            threshold = np.maximum(self.parameters["threshold"].astype(np.float64), 0)
            h, margin = np.where(pre > threshold, pre, 0), np.abs(pre - threshold)
        elif self.activation == "gated":
            gate = p + self.parameters["gate_bias"]
            h, margin = np.where(gate > 0, positive, 0), np.abs(gate)
        else:
            size, kept = (np.abs(pre), pre) if self.activation == "abstopk" else (pre, positive)
            order = np.argsort(-size, axis=1, kind="stable")
            h = np.zeros_like(pre)
            np.put_along_axis(h, order[:, : self.k], np.take_along_axis(kept, order[:, : self.k], 1), 1)
            ranked = np.take_along_axis(size, order, 1)
            kth = ranked[:, self.k - 1 : self.k]
            following = ranked[:, self.k : self.k + 1] if self.k < self.d_sae else np.full_like(kth, -np.inf)
            margin = np.where(h != 0, size - following, np.where(size >= kth, np.inf, kth - size))
        if self.columns is not None:
            h, margin = h[:, self.columns], margin[:, self.columns]
        return h, margin

    def normalised(self, acts: Any) -> Any:
        x = acts.astype(np.float64)
        if self.parameters["input_norm"] == "layer_norm":
            return (x - x.mean(1, keepdims=True)) / (x.std(1, ddof=1, keepdims=True) + 1e-5)
        if self.parameters["input_norm"] == "constant_norm_rescale":
            norms = np.linalg.norm(x, axis=1, keepdims=True)
            return x * np.sqrt(x.shape[1]) / np.where(norms == 0, 1, norms)
        return x

    def shift(self, encoder: Any = None, parts: Any = (None,), **chosen: Any) -> dict[str, Any]:
        """All outputs of accumulate_shift, over the rows in the given slices."""
        sums = {name: self.at.zeros(self.n_columns) for name in SUMS}
        sums |= {name: self.at.zeros(self.n_columns, dtype=np.int64) for name in COUNTS}
        sums["weighted_sq_shift"] = self.at.zeros(self.n_columns, self.weights.shape[1])
        encoder = self.encoder() if encoder is None else encoder
        for part in parts:
            rows = slice(None) if part is None else part
            base, other = (self.at.rows(chosen.get(name, getattr(self, name))[rows]) for name in ("base", "other"))
            self.at.ops.accumulate_shift(
                encoder, base, other, columns=self.columns, row_weights=self.weights[rows], **sums
            )
        return {name: to_numpy(values) for name, values in sums.items()}

    def moments(self, encoder: Any = None, parts: Any = (None,), **chosen: Any) -> dict[str, Any]:
        """All outputs of accumulate_moments, over the rows in the given slices."""
        sums = {"sum_h": self.at.zeros(self.n_columns), "sum_sq_h": self.at.zeros(self.n_columns)}
        sums["n_fired"] = self.at.zeros(self.n_columns, dtype=np.int64)
        sums["sum_hy"] = self.at.zeros(self.n_columns, self.weights.shape[1])
        encoder = self.encoder() if encoder is None else encoder
        for part in parts:
            rows = slice(None) if part is None else part
            acts = self.at.rows(chosen.get("base", self.base)[rows])
            self.at.ops.accumulate_moments(encoder, acts, self.weights[rows], columns=self.columns, **sums)
        return {name: to_numpy(values) for name, values in sums.items()}

    def sparse(self, encoder: Any = None) -> tuple[Any, ...]:
        """The features of `base`: (indptr, indices, values), numpy arrays."""
        return self.at.sparse(self.encoder() if encoder is None else encoder, self.base, self.columns)

    def wanted_shift(self) -> dict[str, Any]:
        (a, _), (b, _) = self.features(self.base), self.features(self.other)
        square = (b - a) ** 2
        return {
            "sum_sq_shift": square.sum(0),
            "sum_base": a.sum(0),
            "sum_other": b.sum(0),
            "sum_sq_base": (a**2).sum(0),
            "sum_sq_other": (b**2).sum(0),
            "n_fired_base": (a != 0).sum(0),
            "n_fired_other": (b != 0).sum(0),
            "weighted_sq_shift": square.T @ self.weights,
        }

    def wanted_moments(self) -> dict[str, Any]:
        h, _ = self.features(self.base)
        return {
            "sum_h": h.sum(0),
            "sum_sq_h": (h**2).sum(0),
            "n_fired": (h != 0).sum(0),
            "sum_hy": h.T @ self.weights,
        }


def assert_same(got: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name in wanted:
        np.testing.assert_array_equal(got[name], wanted[name], err_msg=name, strict=True)


def assert_exact(got: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name in wanted:
        np.testing.assert_array_equal(got[name], wanted[name], err_msg=name)


def assert_sparse_exact(problem: Problem, found: tuple[Any, ...]) -> None:
    """found: (indptr, indices, values) of the features of `base`."""
    indptr, indices, values = found
    h, _ = problem.features(problem.base)
    rows, columns = np.nonzero(h)
    assert (indptr.dtype, indices.dtype, values.dtype) == (np.int64, np.int32, np.float32)
    np.testing.assert_array_equal(indptr, np.r_[0, np.cumsum((h != 0).sum(1))])
    np.testing.assert_array_equal(indices, columns if problem.columns is None else problem.columns[columns])
    np.testing.assert_array_equal(values, h[rows, columns])


def assert_all_exact(problem: Problem, encoder: Any = None) -> None:
    """Of every op, for whole numbers."""
    encoder = problem.encoder() if encoder is None else encoder
    assert_exact(problem.shift(encoder), problem.wanted_shift())
    assert_exact(problem.moments(encoder), problem.wanted_moments())
    assert_sparse_exact(problem, problem.sparse(encoder))


def assert_close(problem: Problem, got: dict[str, Any], wanted: dict[str, Any], members: tuple[Any, ...]) -> None:
    """To 1e-5 of each column's own size, or of one feature of size 1 where the column has less.

    Columns in which a firing lies within rounding of flipping are left out.
    """
    scale, firm = np.zeros(problem.n_columns), np.ones(problem.n_columns, bool)
    positive_firm = np.ones(problem.n_columns, bool)
    for acts in members:
        h, margin = problem.features(acts)
        firm &= (margin > 1e-5).all(0)
        positive_firm &= (~((h != 0) & (np.abs(h) < 1e-5))).all(0)
        scale += (h**2).sum(0) + np.abs(h).sum(0)
    assert problem.n == 0 or firm.mean() > 0.5, "the margin left too little to compare"
    for name, value in wanted.items():
        if name.startswith("n_fired"):
            # relu's own edge at 0 moves a count, though no sum.
            sure = firm & positive_firm & count_is_firm(problem, members)
            np.testing.assert_array_equal(got[name][sure], value[sure], err_msg=name)
            continue
        weight = np.abs(problem.weights).max(initial=0) if value.ndim == 2 else 1
        size = np.maximum(scale, 1)
        allowed = 1e-5 * weight * (size if value.ndim == 1 else size[:, None])
        off = np.abs(got[name] - value) > allowed
        assert not off[firm].any(), f"{name}: {np.abs(got[name] - value)[firm].max()}"


def count_is_firm(problem: Problem, members: tuple[Any, ...]) -> Any:
    firm = np.ones(problem.n_columns, bool)
    for acts in members:
        pre = problem.normalised(acts) @ problem.W_enc.astype(np.float64) * problem.scale + problem.bias
        pre = pre if problem.columns is None else pre[:, problem.columns]
        firm &= (np.abs(pre) > 1e-5).all(0)
    return firm


def some_columns(d_sae: int) -> Any:
    return np.arange(0, d_sae, 3)
