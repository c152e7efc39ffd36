"""Sparse features of rows: behind a threshold, the k largest of each row, and of 100 columns alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import oracle
from benchmarks.cases import SLICE_BYTES, TOP_K, Bench, Case, Contestant, Product
from sts_fast import SparseFeatures, encode
from sts_fast.ops import backend, torch_backend

Lap = Callable[[str], None]
N_SUBSET = 100


def bench(case: Case) -> Bench:
    """A jumprelu SAE's active features, as compressed sparse rows."""
    contestants = [
        Contestant("sts_fast", partial(ours, case)),
        Contestant("torch backend", partial(torch_ours, case)),
        Contestant("product", product := Product(case), product.prepare),
        Contestant("dense, then to_sparse", partial(dense_to_sparse, case)),
        Contestant("sae-lens, dense", SaeLens(case)),
    ]
    return Bench("encode", case, (case.base,), flops(case), contestants, Check(case))


def bench_topk(case: Case) -> Bench:
    """The k largest features of each row, exactly."""
    contestants = [
        Contestant("sts_fast", partial(ours, case)),
        Contestant("torch backend", partial(torch_ours, case)),
        Contestant("product", product := Product(case), product.prepare),
        Contestant("product, then torch.topk", partial(top_k, case)),
        Contestant("sae-lens, dense", SaeLens(case)),
    ]
    return Bench("topk", case, (case.base,), flops(case), contestants, Check(case, np.arange(case.size.d_sae)))


def bench_subset(case: Case) -> Bench:
    """100 columns of a jumprelu SAE beside all of them, and beside the same columns gathered in torch."""
    columns = subset(case)
    contestants = [
        Contestant("sts_fast", partial(ours, case, columns=columns)),
        Contestant("sts_fast, all columns", partial(ours, case)),
        Contestant("torch, columns gathered before", Gathered(case, columns)),
        Contestant("torch, columns gathered each time", partial(gather, case, columns)),
    ]
    return Bench(
        "subset", case, (case.base,), flops(case) * N_SUBSET // case.size.d_sae, contestants, Check(case, columns)
    )


def bench_topk_subset(case: Case) -> Bench:
    """100 columns of a TopK SAE: whether they are among the k largest depends on all others, which must be computed."""
    columns = subset(case)
    contestants = [
        Contestant("sts_fast", partial(ours, case, columns=columns)),
        Contestant("sts_fast, all columns", partial(ours, case)),
        Contestant("product", product := Product(case), product.prepare),
    ]
    return Bench("topk subset", case, (case.base,), flops(case), contestants, Check(case, columns))


def flops(case: Case) -> int:
    return 2 * case.size.rows * case.size.d_in * case.size.d_sae


def subset(case: Case) -> NDArray[np.int64]:
    return oracle.sample(case.size.d_sae, N_SUBSET)


def ours(case: Case, acts: torch.Tensor, lap: Lap, columns: NDArray[np.int64] | None = None) -> SparseFeatures:
    return encode(case.sae, acts, columns)


def torch_ours(case: Case, acts: torch.Tensor, lap: Lap) -> SparseFeatures:
    """By torch, as on a device without our kernels."""
    encoder = backend.by_torch(case.sae, torch.device(case.device)).encoder
    indptr, indices, values = torch_backend.encode_sparse(encoder, acts)
    return SparseFeatures(indptr, indices, values, case.size.d_sae)


class Entries(NamedTuple):
    """Features one by one: [n_active] each."""

    rows: torch.Tensor
    columns: torch.Tensor
    values: torch.Tensor


class Dense(NamedTuple):
    """Features [len(rows), len(columns)] of these rows and columns."""

    features: torch.Tensor
    rows: range
    columns: NDArray[np.int64]


def dense_to_sparse(case: Case, acts: torch.Tensor, lap: Lap) -> Entries:
    """Dense features, in place, then the positions and values of what fires."""
    assert case.threshold is not None
    parts = []
    for columns in case.slices():
        hidden_pre = torch.addmm(case.bias[columns], acts, case.W_enc[:, columns])
        lap("product")
        rows, indices = (hidden_pre > case.threshold[columns]).nonzero(as_tuple=True)
        lap("nonzero")
        parts.append(Entries(rows, indices + columns.start, hidden_pre[rows, indices]))
        lap("gather")
    return Entries(*map(torch.cat, zip(*parts, strict=True)))


def top_k(case: Case, acts: torch.Tensor, lap: Lap) -> Entries:
    """The k largest of each slice of columns, and of these the k largest."""
    values, indices = [], []
    for columns in case.slices():
        hidden_pre = torch.addmm(case.bias[columns], acts, case.W_enc[:, columns])
        lap("product")
        top = torch.topk(hidden_pre, TOP_K, dim=1, sorted=False)
        values.append(top.values)
        indices.append(top.indices + columns.start)
        lap("topk")
    best, chosen = values[0], indices[0]
    if len(values) > 1:
        best, among = torch.topk(torch.cat(values, dim=1), TOP_K, dim=1, sorted=False)
        chosen = torch.cat(indices, dim=1).gather(1, among)
        lap("topk")
    return Entries(
        torch.arange(len(acts), device=case.device).repeat_interleave(TOP_K), chosen.flatten(), best.relu_().flatten()
    )


class SaeLens:
    """sae-lens' own encode, dense; rows in blocks where they would be too large. Returns the last block."""

    def __init__(self, case: Case) -> None:
        self.sae, self.columns = case.sae_lens(), np.arange(case.size.d_sae)
        self.block_rows = max(1, SLICE_BYTES // (4 * case.size.d_sae))

    def __call__(self, acts: torch.Tensor, lap: Lap) -> Dense:
        for start in range(0, len(acts), self.block_rows):
            features = self.sae.encode(acts[start : start + self.block_rows])
        return Dense(features, range(start, len(acts)), self.columns)


class Gathered:
    """Dense features of a few columns of W_enc, copied when this was made."""

    def __init__(self, case: Case, columns: NDArray[np.int64]) -> None:
        assert case.threshold is not None
        self.columns, numbers = columns, torch.from_numpy(columns).to(case.device)
        self.W_enc, self.bias = case.W_enc[:, numbers], case.bias[numbers]
        self.threshold = case.threshold[numbers]

    def __call__(self, acts: torch.Tensor, lap: Lap) -> Dense:
        hidden_pre = torch.addmm(self.bias, acts, self.W_enc)
        return Dense(hidden_pre.mul_(hidden_pre > self.threshold), range(len(acts)), self.columns)


def gather(case: Case, columns: NDArray[np.int64], acts: torch.Tensor, lap: Lap) -> Dense:
    return Gathered(case, columns)(acts, lap)


class Check:
    """Features of a sample of columns in all rows (or, with topk, of all columns in a sample of n_rows rows)."""

    def __init__(self, case: Case, columns: NDArray[np.int64] | None = None, *, n_rows: int = oracle.N_ROWS) -> None:
        self.case, self.n_rows = case, n_rows
        self.columns = oracle.sample(case.size.d_sae) if columns is None else columns
        self.expected: dict[int, tuple[NDArray[np.int64], oracle.Bounds]] = {}

    def __call__(self, contestant: str, result: Any, inputs: tuple[torch.Tensor]) -> float:
        (acts,) = inputs
        if isinstance(result, dict):
            return oracle.check(self.case, contestant, oracle.product_errors(self.case, acts, result))
        if len(acts) not in self.expected:
            self.expected[len(acts)] = self.expect(acts)
        rows, bounds = self.expected[len(acts)]
        if isinstance(result, Dense):
            inside = np.isin(rows, result.rows)
            bounds, rows = oracle.Bounds(*(part[inside] for part in bounds)), rows[inside]
        got = sampled(result, rows, self.columns, self.case.size.d_sae, len(acts))
        return oracle.check(self.case, contestant, iter([("a feature", oracle.error(got, bounds, bounds.value.max()))]))

    def expect(self, acts: torch.Tensor) -> tuple[NDArray[np.int64], oracle.Bounds]:
        if self.case.architecture != "topk":
            return np.arange(len(acts)), oracle.features(self.case, acts, self.columns)
        rows = oracle.sample(len(acts), self.n_rows)
        bounds = oracle.top_k_features(self.case, acts[torch.from_numpy(rows)])
        return rows, oracle.Bounds(*(part[:, self.columns] for part in bounds))


def sampled(
    result: Any, rows: NDArray[np.int64], columns: NDArray[np.int64], d_sae: int, n_tokens: int
) -> NDArray[np.float64]:
    """[len(rows), len(columns)] features of a result in any of its forms; what is listed twice counts twice."""
    place_of_row, place_of_column = np.full(n_tokens, -1), np.full(d_sae, -1)
    place_of_row[rows], place_of_column[columns] = np.arange(len(rows)), np.arange(len(columns))
    if isinstance(result, Dense):
        place = np.full(d_sae, -1)
        place[result.columns] = np.arange(len(result.columns))
        block = result.features[torch.from_numpy(rows - result.rows.start)][:, torch.from_numpy(place[columns])]
        return block.cpu().double().numpy()
    if isinstance(result, SparseFeatures):
        indptr, indices, values = result.on_cpu().parts
        entries = np.repeat(np.arange(n_tokens), np.diff(indptr)), indices, values
    else:
        entries = tuple(part.cpu().numpy() for part in result)
    at_row, at_column = place_of_row[entries[0]], place_of_column[entries[1]]
    inside = (at_row >= 0) & (at_column >= 0)
    dense = np.zeros((len(rows), len(columns)))
    np.add.at(dense, (at_row[inside], at_column[inside]), entries[2][inside])
    return dense
