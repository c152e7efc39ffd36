"""The core's benchmarks under pytest-benchmark: every contestant is checked against float64, then timed.

    pytest benchmarks --benchmark-only                          small sizes, a minute
    STS_BENCHMARK_SIZE=768x24576x4096 pytest benchmarks --benchmark-only --benchmark-group-by=param:op

The numbers of README.md are those of python -m benchmarks, where contestants run in turn on a quiet machine.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import pytest
import torch

from benchmarks.benches import OPS, make_bench
from benchmarks.cases import Bench, Size

SIZE = Size(*map(int, os.environ.get("STS_BENCHMARK_SIZE", "256x2048x1024").split("x")))
DEVICE = os.environ.get("STS_BENCHMARK_DEVICE", "cpu")


@lru_cache(maxsize=1)
def bench_of(op: str) -> Bench:
    with torch.no_grad():
        return make_bench(op, SIZE, DEVICE)


def contestants() -> list[Any]:
    tiny = Size(d_in=8, d_sae=128, rows=4)
    return [(op, each.name) for op in OPS for each in make_bench(op, tiny, "cpu").contestants]


@pytest.mark.parametrize(("op", "contestant"), contestants())
@torch.no_grad()
def test_op(op: str, contestant: str, benchmark: Any) -> None:
    bench = bench_of(op)
    chosen = next(each for each in bench.contestants if each.name == contestant)
    chosen.prepare()
    bench.check(contestant, run(chosen, bench), bench.inputs)
    benchmark(run, chosen, bench)
    benchmark.extra_info["gflop"] = bench.flops / 1e9


def run(contestant: Any, bench: Bench) -> Any:
    result = contestant.run(*bench.inputs, lap=lambda part: None)
    if bench.case.device != "cpu":
        torch.cuda.synchronize(bench.case.device)
    return result
