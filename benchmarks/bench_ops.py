"""Times the CPU ops beside torch's bare product of the same size, after checking them against float64.

    python -m benchmarks.bench_ops --sizes 768x24576 --rows 4096 --threads 1 2 [--json ops.json]

The product is torch.mm into memory that torch allocated, from float32 activations: what any dense encoder pays before
its activation, difference and sums. The paired shift encodes two members of --rows rows each, so its product has
twice as many rows. Both are timed in turn, A B A B, and the ratio is that of the medians. The ratio of the processor
time that all threads took together holds on a machine that is busy with other work, where that of the clock does not.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sts_fast import _cpu

N_TARGETS, TOP_K, N_SUBSET, N_CHECKED = 16, 64, 100, 64
Array = NDArray[Any]


@dataclass
class Timing:
    op: str
    d_in: int
    d_sae: int
    rows: int
    threads: int
    seconds: float
    product_seconds: float
    gflops: float
    ratio: float
    cpu_ratio: float


class Case:
    """Random activations and an SAE of one size, whose features fire about as often as those of trained ones."""

    def __init__(self, d_in: int, d_sae: int, rows: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.d_in, self.d_sae, self.rows = d_in, d_sae, rows
        self.base = torch.randn(rows, d_in, generator=generator)
        self.other = self.base + 0.3 * torch.randn(rows, d_in, generator=generator)
        self.W_enc = torch.randn(d_in, d_sae, generator=generator) / d_in**0.5
        self.pair = torch.cat([self.base, self.other])
        self.product = torch.empty(2 * rows, d_sae)
        self.columns = np.sort(np.random.default_rng(0).permutation(d_sae)[:N_SUBSET])
        self.targets = np.random.default_rng(1).standard_normal((rows, N_TARGETS))
        zero = np.zeros(d_sae, np.float32)
        # Pre-activations are about normal with deviation 1: 64 firings per row, or 1% of a narrow SAE.
        rate = min(TOP_K / d_sae, 0.01)
        self.threshold = np.full(d_sae, statistics.NormalDist().inv_cdf(1 - rate), np.float32)
        self.relu = _cpu.Encoder(self.W_enc, zero, activation="relu")
        self.jumprelu = _cpu.Encoder(self.W_enc, zero, activation="jumprelu", threshold=self.threshold)
        self.topk = _cpu.Encoder(self.W_enc, zero, activation="topk", k=TOP_K)
        self.ops: dict[str, tuple[Callable[[], object], int, int]] = {
            # name: (op, rows of its product, columns of its product)
            "shift relu": (lambda: self.shift(self.relu), 2 * rows, d_sae),
            "shift jumprelu": (lambda: self.shift(self.jumprelu), 2 * rows, d_sae),
            "shift topk": (lambda: self.shift(self.topk), 2 * rows, d_sae),
            "moments K=16 jumprelu": (self.moments, rows, d_sae),
            "encode_sparse jumprelu": (lambda: _cpu.encode_sparse(self.jumprelu, self.base), rows, d_sae),
            "encode_sparse topk": (lambda: _cpu.encode_sparse(self.topk, self.base), rows, d_sae),
            "encode_sparse 100 columns": (
                lambda: _cpu.encode_sparse(self.jumprelu, self.base, self.columns),
                rows,
                N_SUBSET,
            ),
        }

    def shift(self, encoder: _cpu.Encoder) -> dict[str, Array]:
        sums: dict[str, Array] = {
            name: np.zeros(self.d_sae)
            for name in ("sum_sq_shift", "sum_base", "sum_other", "sum_sq_base", "sum_sq_other")
        }
        sums |= {name: np.zeros(self.d_sae, np.int64) for name in ("n_fired_base", "n_fired_other")}
        _cpu.accumulate_shift(encoder, self.base, self.other, **sums)
        return sums

    def moments(self) -> dict[str, Array]:
        sums: dict[str, Array] = {name: np.zeros(self.d_sae) for name in ("sum_h", "sum_sq_h")}
        sums |= {"n_fired": np.zeros(self.d_sae, np.int64), "sum_hy": np.zeros((self.d_sae, N_TARGETS))}
        _cpu.accumulate_moments(self.jumprelu, self.base, self.targets, **sums)
        return sums

    def bare_product(self, n_rows: int) -> None:
        acts = self.base if n_rows == self.rows else self.pair
        torch.mm(acts, self.W_enc, out=self.product[:n_rows])

    def check(self) -> None:
        """Compares with float64 on a sample of columns; raises where they differ by more than 1e-5."""
        columns = np.sort(np.random.default_rng(2).permutation(self.d_sae)[:N_CHECKED])
        W = self.W_enc[:, torch.from_numpy(columns)].double()
        pre_base, pre_other = ((acts.double() @ W).numpy() for acts in (self.base, self.other))
        sums, relu_base, relu_other = self.shift(self.relu), pre_base.clip(0), pre_other.clip(0)
        close("sum_sq_shift", sums["sum_sq_shift"][columns], ((relu_other - relu_base) ** 2).sum(0))
        close("sum_base", sums["sum_base"][columns], relu_base.sum(0))
        close("sum_sq_other", sums["sum_sq_other"][columns], (relu_other**2).sum(0))
        # A pre-activation within rounding of its threshold may fall on either side: leave such columns out.
        threshold = self.threshold[columns].astype(np.float64)
        clear = (np.abs(pre_base - threshold) > 1e-5).all(0)
        h = np.where(pre_base > threshold, pre_base, 0)
        moments = self.moments()
        close("sum_h", moments["sum_h"][columns][clear], h.sum(0)[clear])
        scale = np.abs(h).T @ np.abs(self.targets)
        close("sum_hy", moments["sum_hy"][columns][clear], (h.T @ self.targets)[clear], scale[clear])
        indptr, indices, values = _cpu.encode_sparse(self.jumprelu, self.base)
        dense = np.zeros(self.d_sae)
        np.add.at(dense, indices, values)
        close("encode_sparse", dense[columns][clear], h.sum(0)[clear])
        indptr, indices, values = _cpu.encode_sparse(self.topk, self.base)
        wanted = torch.topk(self.base.double() @ self.W_enc.double(), TOP_K).values.sum(1) if self.small() else None
        if wanted is not None:
            close("topk", np.add.reduceat(values.astype(np.float64), indptr[:-1]), wanted.numpy())

    def small(self) -> bool:
        return self.rows * self.d_in * self.d_sae < 1e11


def close(name: str, got: Array, wanted: Array, scale: Array | None = None) -> None:
    error = np.abs(got - wanted) / np.maximum(np.abs(wanted) if scale is None else scale, 1e-30)
    if error.size and error.max() > 1e-5:
        raise SystemExit(f"{name} differs from float64 by {error.max():.1e} relative")


def time_once(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the clock, and of the processor over all threads."""
    clock, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - clock, time.process_time() - cpu


def time_case(case: Case, threads: int, repeats: int) -> list[Timing]:
    _cpu.set_num_threads(threads)
    torch.set_num_threads(threads)
    timings = []
    for name, (run, n_rows, n_columns) in case.ops.items():

        def product(n_rows: int = n_rows) -> None:
            case.bare_product(n_rows)

        run(), product()
        rounds = [(*time_once(run), *time_once(product)) for _ in range(repeats)]
        seconds, cpu, product_seconds, product_cpu = (statistics.median(each) for each in zip(*rounds, strict=True))
        flops = 2 * n_rows * case.d_in * n_columns
        timings.append(
            Timing(
                op=name,
                d_in=case.d_in,
                d_sae=case.d_sae,
                rows=case.rows,
                threads=threads,
                seconds=seconds,
                product_seconds=product_seconds,
                gflops=flops / seconds / 1e9,
                ratio=seconds / product_seconds,
                cpu_ratio=cpu / product_cpu,
            )
        )
        print(row_of(timings[-1]), flush=True)
    return timings


HEADER = (
    f"{'op':26} {'d_in x d_sae':>13} {'rows':>6} {'thr':>3} {'ms':>9} {'torch.mm':>9} {'GFLOP/s':>8} "
    f"{'ratio':>7} {'CPU':>6}"
)


def row_of(t: Timing) -> str:
    return (
        f"{t.op:26} {f'{t.d_in}x{t.d_sae}':>13} {t.rows:6} {t.threads:3} {t.seconds * 1e3:9.2f} "
        f"{t.product_seconds * 1e3:9.2f} {t.gflops:8.1f} {t.ratio:7.3f} {t.cpu_ratio:6.3f}"
    )


def size(text: str) -> tuple[int, int]:
    d_in, d_sae = text.split("x")
    return int(d_in), int(d_sae)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=size, nargs="+", default=[(256, 2048), (768, 24576)], metavar="D_INxD_SAE")
    parser.add_argument("--rows", type=int, default=4096, help="rows of activations; pairs, for the shift")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--instruction-set", default=_cpu.instruction_set())
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the timings there too")
    options = parser.parse_args(arguments)
    _cpu.set_instruction_set(options.instruction_set)
    timings = []
    print(HEADER)
    for d_in, d_sae in options.sizes:
        case = Case(d_in, d_sae, options.rows)
        case.check()
        for threads in options.threads:
            timings += time_case(case, threads, options.repeats)
    if options.json:
        machine = {
            "processor": platform.processor() or platform.machine(),
            "instruction_set": _cpu.instruction_set(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        options.json.write_text(
            json.dumps({"machine": machine, "timings": [asdict(t) for t in timings]}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
