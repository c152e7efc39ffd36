"""Paired shift: sums over rows of (h_b - h_a)^2 and the rest of accumulate_shift, beside dense encodes in torch.

All peers compute the sum of squares alone, in float32; sts_fast computes it alone, and with all its statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks import oracle
from benchmarks.cases import Bench, Case, Contestant, Product
from benchmarks.timing import timed_run
from sts_fast import ShiftStats
from sts_fast.ops import _cpu, backend, torch_backend
from sts_fast.ops.shift import _COUNTS, _SUMS

Lap = Callable[[str], None]
# Rows and columns of a chunk: small enough for the caches, large enough for the product. The fastest is taken.
CHUNKS = ((512, 2048), (2048, 2048), (2048, 512))
PART_ROWS, PART_COLUMNS = 2048, 8192


def bench(case: Case) -> Bench:
    contestants = [
        Contestant("sts_fast", partial(all_statistics, case)),
        Contestant("torch backend", partial(torch_ours, case)),
        Contestant("product", product := Product(case), product.prepare),
        Contestant("authors' way", partial(authors, case)),
        Contestant("in place", partial(in_place, case)),
        Contestant("sae-lens", SaeLens(case)),
        Contestant("torch.compile", compiled := Compiled(case), compiled.prepare),
    ]
    if case.device == "cpu":
        contestants.insert(1, Contestant("sts_fast, sum_sq_shift only", partial(squares_only, case)))
    inputs = (case.base, case.other)
    flops = 2 * 2 * case.size.rows * case.size.d_in * case.size.d_sae
    return Bench("shift", case, inputs, flops, contestants, Check(case))


def all_statistics(case: Case, base: torch.Tensor, other: torch.Tensor, lap: Lap) -> dict[str, Any]:
    stats = ShiftStats(case.sae)
    stats.update(base, other)
    return {name: getattr(stats, name) for name in (*_SUMS, *_COUNTS)}


def squares_only(case: Case, base: torch.Tensor, other: torch.Tensor, lap: Lap) -> dict[str, Any]:
    sums = np.zeros(case.size.d_sae)
    _cpu.accumulate_shift(backend.encoder(case.sae), base, other, sum_sq_shift=sums)
    return {"sum_sq_shift": sums}


def torch_ours(case: Case, base: torch.Tensor, other: torch.Tensor, lap: Lap) -> dict[str, Any]:
    """All statistics, as a device without our kernels gets them."""
    device = torch.device(case.device)
    sums = {name: torch.zeros(case.size.d_sae, dtype=torch.float64, device=device) for name in _SUMS}
    sums |= {name: torch.zeros(case.size.d_sae, dtype=torch.int64, device=device) for name in _COUNTS}
    torch_backend.accumulate_shift(backend.by_torch(case.sae, device).encoder, base, other, **sums)
    return sums


def authors(case: Case, base: torch.Tensor, other: torch.Tensor, lap: Lap) -> dict[str, Any]:
    """Dense encode, subtract, square, sum: each line of the equation as torch writes it."""
    total = torch.empty(case.size.d_sae, device=case.device)

    def encode(acts: torch.Tensor, columns: slice) -> torch.Tensor:
        hidden_pre = (acts - case.b_dec) @ case.W_enc[:, columns]
        lap("product")
        features = torch.relu(hidden_pre + case.b_enc[columns])
        lap("activation")
        return features

    for columns in case.slices():
        h_base, h_other = encode(base, columns), encode(other, columns)
        difference = h_other - h_base
        lap("difference")
        total[columns] = (difference**2).sum(dim=0)
        lap("sum")
    return {"sum_sq_shift": total}


def in_place(case: Case, base: torch.Tensor, other: torch.Tensor, lap: Lap) -> dict[str, Any]:
    """The same in two dense tensors: biases folded into the product, all else in place."""
    total = torch.empty(case.size.d_sae, device=case.device)
    for columns in case.slices():
        h = []
        for acts in (base, other):
            h.append(torch.addmm(case.bias[columns], acts, case.W_enc[:, columns]))
            lap("product")
            h[-1].relu_()
            lap("activation")
        difference = h[1].sub_(h[0])
        lap("difference")
        torch.sum(difference.square_(), dim=0, out=total[columns])
        lap("sum")
    return {"sum_sq_shift": total}


class SaeLens:
    """sae-lens' own encode of both members, then in place."""

    def __init__(self, case: Case) -> None:
        self.case, self.saes = case, [(columns, case.sae_lens(columns)) for columns in case.slices()]

    def __call__(self, base: torch.Tensor, other: torch.Tensor, lap: Lap) -> dict[str, Any]:
        total = torch.empty(self.case.size.d_sae, device=self.case.device)
        for columns, sae in self.saes:
            h_base, h_other = sae.encode(base), sae.encode(other)
            lap("encode")
            difference = h_other.sub_(h_base)
            lap("difference")
            torch.sum(difference.square_(), dim=0, out=total[columns])
            lap("sum")
        return {"sum_sq_shift": total}


def shift_of_chunk(base: torch.Tensor, other: torch.Tensor, W_enc: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return (torch.relu(other @ W_enc + bias) - torch.relu(base @ W_enc + bias)).square().sum(dim=0)


class Compiled:
    """torch.compile of the whole, chunk by chunk, so that a chunk's features stay in the cache."""

    def __init__(self, case: Case) -> None:
        self.case, self.chunk, self.n_columns = case, CHUNKS[0], case.size.d_sae
        self.run = torch.compile(shift_of_chunk, dynamic=False)

    def prepare(self) -> None:
        """Compiles for this number of threads and takes the chunk that is fastest on a part of the whole."""
        torch._dynamo.reset()
        part = (self.case.base[:PART_ROWS], self.case.other[:PART_ROWS])
        self.n_columns = min(PART_COLUMNS, self.case.size.d_sae)
        times = {}
        for self.chunk in CHUNKS:
            if len(part[0]) % self.chunk[0] == 0 and self.n_columns % self.chunk[1] == 0:
                self(*part, lap=lambda _: None)
                times[self.chunk] = timed_run(self, part, self.case.device).cpu
        self.chunk = min(times, key=lambda chunk: times[chunk]) if times else CHUNKS[0]
        self.n_columns = self.case.size.d_sae

    def __call__(self, base: torch.Tensor, other: torch.Tensor, lap: Lap) -> dict[str, Any]:
        total = torch.zeros(self.case.size.d_sae, device=self.case.device)
        n_rows, n_columns = self.chunk
        for columns in (slice(start, start + n_columns) for start in range(0, self.n_columns, n_columns)):
            W_enc, bias = self.case.W_enc[:, columns], self.case.bias[columns]
            for chunk_base, chunk_other in zip(base.split(n_rows), other.split(n_rows), strict=True):
                total[columns] += self.run(chunk_base, chunk_other, W_enc, bias)
        return {"sum_sq_shift": total}


class Check:
    """Every statistic of a contestant on a sample of columns; the bare product on some of its rows."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.columns = oracle.sample(case.size.d_sae)
        self.sums: dict[int, dict[str, oracle.Bounds]] = {}

    def __call__(self, contestant: str, result: dict[str, Any], inputs: tuple[torch.Tensor, torch.Tensor]) -> float:
        if "hidden_pre" in result:
            return oracle.check(self.case, contestant, oracle.product_errors(self.case, inputs[-1], result))
        n_rows = len(inputs[0])
        if n_rows not in self.sums:
            self.sums[n_rows] = oracle.shift_sums(*(oracle.features(self.case, acts, self.columns) for acts in inputs))
        expected = self.sums[n_rows]
        return oracle.check(
            self.case,
            contestant,
            ((name, oracle.error(sums[self.columns], expected[name])) for name, sums in result.items()),
        )
