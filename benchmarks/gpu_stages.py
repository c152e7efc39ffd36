"""What the stages of benchmarks/gpu.py do, each in a process of its own.

    python3 -m benchmarks.gpu_stages STAGE VARIANT

What is found goes to stdout at once, as records among the lines that are printed. One failing case leaves the others:
its error is recorded, its traceback printed, and the stage fails in the end.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.gpu import RECORD, ROOT, Record
from benchmarks.gpu_problem import TARGETS, TOP_K, Problem

BUILT = ROOT / "build" / "gpu"
TOOLKIT = f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin"
N_ROWS = 32_768
SHIFT_SIZES = ((3584, 65_536), (4096, 131_072), (2304, 16_384))
TOP_K_SIZES = ((3584, 65_536), (3584, 131_072))
CHECKED_SIZES = ((70, 300, 150), (768, 5_000, 3_001), (2304, 16_384, 1_000))
CHUNK = 4096  # rows of a dense peer's chunk
ROUNDS = 7
FLOOR = "bare product, bf16"
# Largest relative errors of sums. Float32 products added in order are off by 1.3e-5 at most at these sizes.
ALLOWED = {"fp32": 3e-5, "bf16x2": 1e-4, "bf16": 1e-4, "float64": 1e-12}

Contestants = dict[str, Callable[[], Any]]


class Stage:
    """What a stage has found, and which of its cases have failed."""

    def __init__(self) -> None:
        self.records = os.dup(1)  # pytest takes stdout for itself
        self.failed: list[str] = []

    def note(self, **found: Any) -> None:
        line = f"{RECORD}{json.dumps(found)}\n".encode()
        while line:
            line = line[os.write(self.records, line) :]

    @contextmanager
    def case(self, name: str) -> Iterator[None]:
        """An error inside is this case's alone."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.fail(name, f"{type(error).__name__}: {error}")

    def fail(self, name: str, why: str) -> None:
        self.failed.append(name)
        self.note(errors={name: why.strip()[:2000]})

    def check(self, name: str, kind: str, error: float) -> None:
        self.note(relative_errors={name: error})
        if not error <= ALLOWED[kind]:
            self.fail(name, f"off by {error:.3g}, where {ALLOWED[kind]:g} is allowed")


def main(name: str, variant: str) -> int:
    stage = Stage()
    sys.path.insert(0, str(BUILT))
    if variant in ("sm80", "sm90"):
        use_loop(variant)
    try:
        STAGES[name](stage, variant)
    except Exception as error:
        traceback.print_exc()
        stage.note(error=f"{type(error).__name__}: {error}"[:2000])
        return 1
    if stage.failed:
        stage.note(error=f"{len(stage.failed)} failed: {', '.join(stage.failed)}"[:2000])
        return 1
    stage.note(finished=True)
    return 0


def use_loop(loop: str) -> None:
    from sts_fast.ops import cuda
    from sts_fast.ops.cuda_kernels import load

    if loop not in load().main_loops(0):
        raise RuntimeError(f"this build has no main loop {loop} for this GPU")
    cuda.MAIN_LOOP = loop
    os.environ["STS_KERNELS"] = "trust"  # this loop, whatever the package's own check would choose


def build(stage: Stage, _: str) -> None:
    import torch

    major, minor = torch.cuda.get_device_capability()
    architecture = "90a-real" if (major, minor) == (9, 0) else f"{major}{minor}-real"
    command = [sys.executable, "-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps", "--no-index"]
    command += ["--upgrade", "--target", str(BUILT), "-C", "cmake.define.STS_CUDA=ON"]
    command += ["-C", f"cmake.define.STS_CUDA_ARCHITECTURES={architecture}", str(ROOT)]
    shutil.rmtree(BUILT, ignore_errors=True)
    subprocess.run(command, check=True, env=os.environ | {"PATH": TOOLKIT})
    library = next((BUILT / "sts_fast" / "ops").glob("_cuda*.so"))
    stage.note(architecture=architecture, megabytes=round(library.stat().st_size / 1e6, 2))


def check(stage: Stage, loop: str) -> None:
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)  # then torch.empty is filled with not-a-numbers
    seed = int.from_bytes(os.urandom(4), "little")
    stage.note(seed=seed)
    for d_in, d_sae, rows in CHECKED_SIZES:
        for precision in ("bf16x2", "fp32"):
            name = f"{precision} %s {d_in}x{d_sae}"
            with stage.case(name % "problem"):
                problem = Problem(d_in, d_sae, rows, "jumprelu", precision, seed)
                top = Problem(d_in, d_sae, rows, "topk", precision, seed)
                errors: dict[str, Callable[[], float]] = {
                    "shift": lambda problem=problem: problem.shift_error(problem.shift()),
                    "moments": problem.moments_error,
                    "topk": top.top_k_error,
                }
                for what, error in errors.items():
                    with stage.case(name % what):
                        stage.check(name % what, precision, error())
                with stage.case(name % "prompts' sums"):
                    stage.check(name % "prompts' sums", "float64", problem.by_prompt_error())
    torch.use_deterministic_algorithms(False)
    run_tests(stage, loop)


def run_tests(stage: Stage, loop: str) -> None:
    """The tests of the CUDA ops, in this process, with its main loop."""
    import pytest

    class Watch:
        """Notes a failing test at once."""

        counts: Record = {"passed": 0, "failed": 0, "skipped": 0}  # noqa: RUF012

        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome == "failed":
                self.counts[report.outcome] += 1
            if report.outcome == "failed":
                stage.fail(report.nodeid.split("::")[-1], str(report.longreprtext)[-1500:])

    other = {"sm80": "sm90", "sm90": "sm80"}[loop]
    options = ["-q", "--maxfail=8", "-o", "filterwarnings=default", "-p", "no:cacheprovider", "-p", "no:xdist"]
    tests = [str(ROOT / "tests" / "ops" / name) for name in ("test_cuda.py", "test_sum_by_prompt.py")]
    watch = Watch()
    code = pytest.main([*options, *tests, "-k", f"not emulator and not {other}"], plugins=[watch])
    stage.note(tests=", ".join(f"{n} {outcome}" for outcome, n in watch.counts.items()))
    if code and not stage.failed:
        raise RuntimeError(f"pytest ended with {code!r}")


def verify(stage: Stage, _: str) -> None:
    """The check that the package makes of its kernels before they serve a GPU."""
    import torch

    from sts_fast.ops import verified

    for found in verified.cases(torch.device("cuda:0")):
        print(found, flush=True)
        if "verdict" in found:
            stage.note(verdict=found["verdict"])
            if found["verdict"]["why"]:
                stage.fail("verify", found["verdict"]["why"])


def bench(stage: Stage, _: str) -> None:
    for d_in, d_sae in SHIFT_SIZES:
        for case in (shift_case, moments_case, encode_case):
            time_case(stage, case, d_in, d_sae)
    for d_in, d_sae in TOP_K_SIZES:
        time_case(stage, top_k_case, d_in, d_sae)


def peers(stage: Stage, _: str) -> None:
    for d_in, d_sae in SHIFT_SIZES:
        time_case(stage, shift_peers, d_in, d_sae)
    for d_in, d_sae in TOP_K_SIZES:
        time_case(stage, top_k_peers, d_in, d_sae)


Case = Callable[[Stage, int, int], tuple[str, Contestants]]


def time_case(stage: Stage, case: Case, d_in: int, d_sae: int) -> None:
    import torch

    name = f"{case.__name__} {d_in}x{d_sae}"
    with stage.case(name):
        op, contestants = case(stage, d_in, d_sae)
        timed(stage, op, contestants, {"d_in": d_in, "d_sae": d_sae, "rows": N_ROWS})
    with stage.case(f"{name}, memory"):
        torch.cuda.empty_cache()


def problem_of(d_in: int, d_sae: int, activation: str, precision: str = "bf16") -> Problem:
    import torch

    return Problem(d_in, d_sae, N_ROWS, activation, precision, dtype=torch.bfloat16)


def product_of(problem: Problem, *members: Any, then: Callable[[Any], Any] | None = None) -> Callable[[], None]:
    """The bare product of rows with the weights, in chunks, which nobody can do without."""
    import torch

    out = torch.empty(CHUNK, problem.d_sae, dtype=torch.bfloat16, device="cuda")

    def product() -> None:
        for acts in members:
            for part in acts.split(CHUNK):
                torch.mm(part, problem.W_enc, out=out[: len(part)])
                if then:
                    then(out[: len(part)])

    return product


def shift_case(stage: Stage, d_in: int, d_sae: int) -> tuple[str, Contestants]:
    """Seven statistics of a jumprelu SAE over pairs of bfloat16 rows."""
    problem = problem_of(d_in, d_sae, "jumprelu")
    contestants: Contestants = {FLOOR: product_of(problem, problem.base, problem.other)}
    for precision, of in (("bf16", problem), ("bf16x2", problem_of(d_in, d_sae, "jumprelu", "bf16x2"))):
        name = f"shift {d_in}x{d_sae}, {precision}"
        failed = len(stage.failed)
        with stage.case(name):
            stage.check(name, precision, of.shift_error(of.shift()))
        if len(stage.failed) == failed:  # what is wrong gets no time
            contestants[f"ours, {precision}"] = of.shift
            if precision == "bf16":
                contestants[f"ours, bf16, {TARGETS} replicates"] = of.weighted_shift
    return "shift", contestants


def moments_case(stage: Stage, d_in: int, d_sae: int) -> tuple[str, Contestants]:
    problem = problem_of(d_in, d_sae, "jumprelu")
    error = problem.moments_error()
    assert error <= ALLOWED["bf16"], f"off by {error}"
    return f"correlation, K = {TARGETS}", {FLOOR: product_of(problem, problem.base), "ours, bf16": problem.moments}


def encode_case(stage: Stage, d_in: int, d_sae: int) -> tuple[str, Contestants]:
    problem = problem_of(d_in, d_sae, "jumprelu")
    return "sparse encode", {FLOOR: product_of(problem, problem.base), "ours, bf16": problem.sparse}


def top_k_case(stage: Stage, d_in: int, d_sae: int) -> tuple[str, Contestants]:
    problem = problem_of(d_in, d_sae, "topk")
    error = problem.top_k_error()
    assert error <= ALLOWED["bf16"], f"off by {error}"
    return f"topk, k = {TOP_K}", {FLOOR: product_of(problem, problem.base), "ours, bf16": problem.sparse}


def shift_peers(stage: Stage, d_in: int, d_sae: int) -> tuple[str, Contestants]:
    import torch

    problem = problem_of(d_in, d_sae, "jumprelu")
    W_bf16, W_fp32 = problem.W_enc, problem.W_enc.float()

    def chunk(base: Any, other: Any, W: Any) -> list[Any]:
        bias, threshold = problem.bias.to(W.dtype), problem.threshold.to(W.dtype)
        a, b = (torch.addmm(bias, x.to(W.dtype), W) for x in (base, other))
        a, b = (h * (h > threshold) for h in (a, b))
        statistics_of_rows = [(b - a).square(), a, b, a.square(), b.square(), a != 0, b != 0]
        return [values.sum(0, dtype=torch.float32) for values in statistics_of_rows]

    def eager(W: Any, of_chunk: Any = chunk, size: int = CHUNK) -> None:
        total: list[Any] = []
        for base, other in zip(problem.base.split(size), problem.other.split(size), strict=True):
            sums = of_chunk(base, other, W)
            total = [t + s for t, s in zip(total, sums, strict=True)] if total else sums

    compiled = torch.compile(chunk)
    return "shift", {
        FLOOR: product_of(problem, problem.base, problem.other),
        "ours, bf16": problem.shift,
        "torch eager, bf16": lambda: eager(W_bf16),
        "torch eager, float32": lambda: eager(W_fp32),
        "torch.compile in chunks, bf16": lambda: eager(W_bf16, compiled, 2048),
    }


def top_k_peers(stage: Stage, d_in: int, d_sae: int) -> tuple[str, Contestants]:
    import torch

    problem = problem_of(d_in, d_sae, "topk")
    return f"topk, k = {TOP_K}", {
        FLOOR: product_of(problem, problem.base),
        "ours, bf16": problem.sparse,
        "product, then torch.topk": product_of(
            problem, problem.base, then=lambda pre: torch.topk(pre, TOP_K, dim=1, sorted=False)
        ),
    }


def timed(stage: Stage, op: str, contestants: Contestants, about: Record, floor_name: str = FLOOR) -> None:
    """Contestants in turn, round after round: the median, its ratio to the floor, peak memory beside the inputs."""
    import torch

    times: dict[str, list[float]] = {}
    memory = {}
    for name, run in contestants.items():
        with stage.case(f"{op} {about['d_in']}x{about['d_sae']}, {name}"):
            run()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            torch.cuda.synchronize()
            memory[name], times[name] = torch.cuda.max_memory_allocated() - before, []
    for _ in range(ROUNDS):
        for name, milliseconds in times.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            contestants[name]()
            end.record()
            torch.cuda.synchronize()
            milliseconds.append(start.elapsed_time(end))
    floor = statistics.median(times[floor_name])
    for name, milliseconds in times.items():
        median = statistics.median(milliseconds)
        row = {"op": op, **about, "contestant": name, "milliseconds": [round(t, 3) for t in milliseconds]}
        row |= {"median": round(median, 3), "of_floor": round(median / floor, 3), "bytes": memory[name]}
        stage.note(timings=[row])
        print(f"{op} {about['d_in']}x{about['d_sae']} {name}: {median:.2f} ms, {median / floor:.3f}", flush=True)


def forecast(stage: Stage, _: str) -> None:
    """A 7B model's first 20 layers over pairs of prompts, with and without the statistics of a 65,536 wide SAE."""
    import numpy as np
    import torch
    from transformers import AutoModel, Qwen2Config

    from sts_fast.ops import cuda

    config = Qwen2Config(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=20, num_attention_heads=28, num_key_value_heads=4
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = AutoModel.from_config(config).eval()
    torch.set_default_dtype(torch.float32)
    problem = Problem(3584, 65_536, 16, "jumprelu", "bf16", dtype=torch.bfloat16)
    tokens = torch.randint(0, config.vocab_size, (2, 16, 1024), device="cuda")
    sums = problem.new_sums()

    def forward() -> list[Any]:
        with torch.no_grad():
            return [model(input_ids=member, use_cache=False).last_hidden_state.flatten(0, 1) for member in tokens]

    def shift_stage() -> None:
        problem.base, problem.other = forward()
        problem.shift(sums)

    def score_stage() -> None:
        for acts in forward():
            cuda.accumulate_moments(problem.encoder, acts, columns=shifted, **scores)

    shifted = np.arange(0, problem.d_sae, problem.d_sae // 100)[:100]
    scores: dict[str, Any] = {
        name: torch.zeros(100, dtype=torch.float64, device="cuda") for name in ("sum_h", "sum_sq_h")
    }
    scores["n_fired"] = torch.zeros(100, dtype=torch.int64, device="cuda")
    stages = {"forward": forward, "shift stage": shift_stage, "score stage, 100 features": score_stage}
    timed(stage, "forecast", stages, {"d_in": 3584, "d_sae": 65_536, "rows": 16_384}, "forward")


def table(stage: Stage, _: str) -> None:
    """A whole forecast; its checked and timed parts, and memory on the device, as bench_forecast has them."""
    from benchmarks.bench_forecast import SEVEN_B, measured

    measured(SEVEN_B, rounds=3, threads=os.cpu_count() or 1, note=lambda found: stage.note(**found))


def graph(stage: Stage, _: str) -> None:
    import numpy as np
    import torch

    problem = Problem(768, 5_000, 3_001, "jumprelu", "bf16x2")
    expected = {name: values.clone() for name, values in problem.shift().items()}

    def wrong(found: Record, wanted: Record) -> list[str]:
        torch.cuda.synchronize()
        return [name for name, values in wanted.items() if not torch.equal(found[name], values)]

    with stage.case("CUDA graph"):
        sums = problem.new_sums()
        stream, captured = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        problem.shift(sums)  # a first call makes what is made once
        with torch.cuda.graph(captured, stream=stream):
            problem.shift(sums)
        for values in sums.values():
            values.zero_()
        captured.replay()
        stage.check("graph shift", "bf16x2", problem.shift_error(sums))
        assert not (off := wrong(sums, expected)), f"a replay differs in {off}"

    with stage.case("two streams at a time"):
        streams, found = [torch.cuda.Stream() for _ in range(2)], []
        torch.cuda.synchronize()
        for at in range(8):
            with torch.cuda.stream(streams[at % 2]):
                found.append(problem.shift())
        for sums in found:
            assert not (off := wrong(sums, expected)), f"a stream differs in {off}"

    with stage.case("rows that another stream makes"):
        made, kept = torch.cuda.Stream(), problem.base.clone()
        torch.cuda.synchronize()
        with torch.cuda.stream(made):
            torch.cuda._sleep(50_000_000)  # type: ignore[no-untyped-call]
            late = kept.clone()
        torch.cuda.current_stream().wait_stream(made)
        late.record_stream(torch.cuda.current_stream())
        problem.base = late
        assert not (off := wrong(problem.shift(), expected)), f"differs in {off}"
        problem.base = kept

    with stage.case("a subset of columns made on another stream"):
        columns = np.arange(0, problem.d_sae, 7)
        wanted = {name: values[torch.from_numpy(columns).cuda()] for name, values in expected.items()}
        first, second = torch.cuda.Stream(), torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(first):
            torch.cuda._sleep(50_000_000)  # type: ignore[no-untyped-call]
            problem.shift_of(columns)
        with torch.cuda.stream(second):  # finds the subset that the first has not made yet
            sums = problem.shift_of(columns)
        torch.cuda.synchronize()
        for name, values in wanted.items():
            assert torch.allclose(sums[name].double(), values.double(), rtol=1e-4, atol=1e-2), f"differs in {name}"


def sanitize(stage: Stage, variant: str) -> None:
    """A tool over the small problems, which it watches in a process of their own."""
    tool, loop = variant.split()
    program = shutil.which("compute-sanitizer", path=TOOLKIT)
    if program is None:
        stage.note(why="there is no compute-sanitizer")
        return
    # One allocation a tensor, so that what lies behind it is nobody's.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [program, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20", sys.executable]
    start = time.perf_counter()
    subprocess.run([*command, "-m", "benchmarks.gpu_stages", "small", loop], check=True, cwd=ROOT, env=environment)
    stage.note(no_errors_in_seconds=round(time.perf_counter() - start, 1))


def small(stage: Stage, _: str) -> None:
    """Every kernel once, on ragged shapes: what the sanitizer watches."""
    for precision in ("bf16x2", "fp32"):
        for activation in ("jumprelu", "topk"):
            problem = Problem(70, 300, 150, activation, precision)
            for run in (problem.shift, problem.weighted_shift, problem.moments, problem.sparse, problem.by_prompt):
                run()
                print(f"{precision} {activation} {run.__name__}", flush=True)


STAGES: dict[str, Callable[[Stage, str], None]] = {
    stage.__name__: stage for stage in (build, check, verify, bench, forecast, table, graph, peers, sanitize, small)
}


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
