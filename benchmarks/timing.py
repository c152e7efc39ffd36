"""Runs contestants in turn, A B A B, and says on what machine and beside what other work."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

import sts_fast
from benchmarks.cases import Bench, Contestant

WARM_UP_ROWS = 512
MIN_ROUNDS, MAX_ROUNDS, LONG_ROUND = 3, 15, 40.0


class Run(NamedTuple):
    """What one run gave, and its seconds: by the clock, of the processor (all threads together), and of each part."""

    result: Any
    clock: float
    cpu: float
    parts: dict[str, float]


def timed_run(run: Callable[..., Any], inputs: tuple[Any, ...], device: str) -> Run:
    laps, clock, cpu = Laps(device), time.perf_counter(), time.process_time()
    result = run(*inputs, lap=laps)
    synchronize(device)
    return Run(result, time.perf_counter() - clock, time.process_time() - cpu, laps.seconds)


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


class Laps:
    """Seconds of the clock that each part of a run took; called with a part's name when it is done."""

    def __init__(self, device: str) -> None:
        self.device, self.seconds = device, defaultdict[str, float](float)
        self.last = time.perf_counter()

    def __call__(self, part: str) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        self.seconds[part] += now - self.last
        self.last = now


def measure(bench: Bench, threads: int, seconds: float) -> dict[str, Any]:
    """Times every contestant `in_turn`, after a run on a few rows. Raises oracle.WrongResult."""
    device, size = bench.case.device, bench.case.size
    set_num_threads(threads)
    for contestant in bench.contestants:
        contestant.prepare()
        contestant.run(*(rows[:WARM_UP_ROWS] for rows in bench.inputs), lap=Laps(device))
    peak = peak_gflops(threads) if device == "cpu" else None
    return {
        **{"op": bench.op, "d_in": size.d_in, "d_sae": size.d_sae, "rows": size.rows, "threads": threads},
        **{"flops": bench.flops, "peak_gflops": peak},
        **in_turn(bench.contestants, bench.inputs, bench.check, seconds, device),
    }


def in_turn(
    competing: list[Contestant],
    inputs: tuple[Any, ...],
    check: Callable[[str, Any, tuple[Any, ...]], float],
    seconds: float,
    device: str = "cpu",
) -> dict[str, Any]:
    """Times of contestants that run in turn, round after round, until `seconds` are over; and of work by others.

    There are at least MIN_ROUNDS, and two where a round takes longer than LONG_ROUND seconds.

    The results of the first round are checked before there is a second. Raises oracle.WrongResult.
    """
    contestants: dict[str, dict[str, Any]] = {
        each.name: {"seconds": [], "cpu_seconds": [], "parts": defaultdict(list)} for each in competing
    }
    idle, own, start = idle_seconds(), time.process_time(), time.perf_counter()
    checking = 0.0
    n_rounds, took = 0, 0.0
    while (
        n_rounds < 2 or (n_rounds < MIN_ROUNDS and took < 2 * LONG_ROUND) or (n_rounds < MAX_ROUNDS and took < seconds)
    ):
        for contestant in competing:
            run, timed = timed_run(contestant.run, inputs, device), contestants[contestant.name]
            timed["seconds"].append(run.clock)
            timed["cpu_seconds"].append(run.cpu)
            for part, seconds_of_part in run.parts.items():
                timed["parts"][part].append(seconds_of_part)
            if n_rounds == 0:
                before = time.perf_counter()
                timed["error"] = check(contestant.name, run.result, inputs)
                checking += time.perf_counter() - before
            del run  # a dense result must not stand beside the next contestant's
        n_rounds += 1
        took = time.perf_counter() - start - checking
    capacity = (time.perf_counter() - start) * (os.cpu_count() or 1)
    busy_elsewhere = capacity - (idle_seconds() - idle) - (time.process_time() - own)
    return {
        "others": max(busy_elsewhere / capacity, 0.0),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "contestants": contestants,
    }


def set_num_threads(n: int) -> None:
    torch.set_num_threads(n)
    sts_fast.set_num_threads(n)


@cache
def fma_peak() -> Path | None:
    """The program of fma_peak.cpp, compiled for this machine; None where there is no C++ compiler."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        return None
    program = Path(tempfile.mkdtemp(prefix="fma_peak")) / "fma_peak"
    source = Path(__file__).with_name("fma_peak.cpp")
    flags = ["-O3", "-march=native", "-std=c++17", "-pthread"]
    subprocess.run([compiler, *flags, str(source), "-o", str(program)], check=True)
    return program


def peak_gflops(threads: int) -> float | None:
    """GFLOP/s of float32 multiply-adds in registers, measured now."""
    program = fma_peak()
    if program is None:
        return None
    return float(subprocess.run([program, str(threads)], check=True, capture_output=True, text=True).stdout)


def idle_seconds() -> float:
    """Seconds that the processors of the machine have been idle since it started, added up; 0 where nobody counts."""
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()
    except OSError:
        return 0.0
    return (int(fields[4]) + int(fields[5])) / os.sysconf("SC_CLK_TCK")
