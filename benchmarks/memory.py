"""Peak memory that one run takes beyond what was there before and what it returns, in a process of its own.

    python -m benchmarks.memory OP D_IN D_SAE ROWS THREADS DEVICE

prints the bytes of every contestant as JSON. The SAE and the activations are there before, and a run on a few rows has
been made, so that libraries are loaded. torch.compile has seen all of the rows before, and so compiles nothing.
"""

from __future__ import annotations

import ctypes
import json
import operator
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cases import Bench, Size
from sts_fast import SparseFeatures

WARM_UP_ROWS = 64


def measure(op: str, size: Size, device: str, threads: int) -> dict[str, Any]:
    """Extra bytes of every contestant."""
    arguments = [op, str(size.d_in), str(size.d_sae), str(size.rows), str(threads), device]
    command = [sys.executable, "-m", "benchmarks.memory", *arguments]
    ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return {
        **{"op": op, "d_in": size.d_in, "d_sae": size.d_sae, "rows": size.rows, "threads": threads},
        "extra_bytes": json.loads(ran.stdout),
    }


def extra_bytes(bench: Bench, name: str) -> int:
    contestant = next(each for each in bench.contestants if each.name == name)
    warm_up = bench.inputs if name == "torch.compile" else tuple(rows[:WARM_UP_ROWS] for rows in bench.inputs)
    contestant.run(*warm_up, lap=lambda _: None)
    if bench.case.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = contestant.run(*bench.inputs, lap=lambda _: None)
        return torch.cuda.max_memory_allocated() - before - n_bytes(result)
    return extra_resident(contestant.run, bench.inputs)


def extra_resident(run: Callable[..., Any], inputs: tuple[Any, ...]) -> int:
    """Bytes that run(*inputs, lap) takes at most in this process, less those of its result."""
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed and kept would hide what the run takes
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = resident("VmRSS")
    result = run(*inputs, lap=lambda _: None)
    return resident("VmHWM") - before - n_bytes(result)


def resident(field: str) -> int:
    """Bytes of this process in memory: now (VmRSS), or at most since the last reset (VmHWM)."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found
    return int(found[1]) * 1024


def n_bytes(result: Any) -> int:
    """Size of what was asked for. The bare product was asked for no features, so that its output counts as extra."""
    if isinstance(result, dict):
        return sum(n_bytes(value) for key, value in result.items() if key != "hidden_pre")
    if isinstance(result, SparseFeatures):
        return n_bytes(result.parts)
    if isinstance(result, tuple):
        return sum(map(n_bytes, result))
    return result.nbytes if isinstance(result, (np.ndarray, torch.Tensor)) else 0


def in_a_fork(run: Callable[[], int]) -> int:
    """What run() returns in a copy of this process, which must not have used more than one thread."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(send, str(run()).encode())
        finally:
            os._exit(0)
    os.close(send)
    with os.fdopen(receive) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    if not text:
        raise RuntimeError("a contestant died while its memory was measured")
    return int(text)


def main() -> None:
    from benchmarks.benches import make_bench
    from benchmarks.timing import set_num_threads

    op, d_in, d_sae, rows, threads, device = sys.argv[1:]
    torch.set_num_threads(1)
    bench = make_bench(op, Size(int(d_in), int(d_sae), int(rows)), device)

    @torch.no_grad()
    def extra_bytes_of(name: str) -> int:
        set_num_threads(int(threads))
        return extra_bytes(bench, name)

    names = [contestant.name for contestant in bench.contestants]
    apart = in_a_fork if device == "cpu" else operator.call  # a GPU's memory is counted, and cannot be forked
    print(json.dumps({name: apart(partial(extra_bytes_of, name)) for name in names}))


if __name__ == "__main__":
    main()
