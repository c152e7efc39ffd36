"""The bench of every op."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks import bench_correlate, bench_encode, bench_shift
from benchmarks.cases import Bench, Case, Size

# op: (its bench, the SAE's architecture)
OPS: dict[str, tuple[Callable[[Case], Bench], str]] = {
    "shift": (bench_shift.bench, "standard"),
    "correlate": (bench_correlate.bench, "standard"),
    "encode": (bench_encode.bench, "jumprelu"),
    "subset": (bench_encode.bench_subset, "jumprelu"),
    "topk": (bench_encode.bench_topk, "topk"),
    "topk subset": (bench_encode.bench_topk_subset, "topk"),
}


def make_bench(op: str, size: Size, device: str) -> Bench:
    bench, architecture = OPS[op]
    return bench(Case(size, architecture, device))
