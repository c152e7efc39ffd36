"""Builds, checks and times the CUDA core on the GPU of this machine: `make gpu`.

    python3 -m benchmarks.gpu                    all stages
    python3 -m benchmarks.gpu build check bench  these

Needs a torch with CUDA, nvcc, and what pyproject.toml names under build-system, all installed; no network. What each
stage finds is saved at once in benchmarks/results/<gpu>.json. Each stage takes less than ten minutes.

    build     the package for this GPU, into build/gpu
    check     the tests of the CUDA ops on the device; then larger random problems, new ones every time, against
              float64, with memory poisoned before it is handed out, on every main loop, and in a CUDA graph
    sanitize  compute-sanitizer's memcheck and racecheck over every kernel, on small shapes
    bench     ours in each precision beside the bare product, eager and compiled torch, in turns, checked first
    forecast  a language model's forward passes with and without the statistics of what they compute
    table     a whole forecast with a Qwen2.5-7B-shaped model and an SAE 131,072 wide, beside its bare passes, queries
              run alone and the published way (see bench_forecast)
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.gpu_problem import TARGETS, TOP_K, Problem

ROOT = Path(__file__).parents[1]
BUILT = ROOT / "build" / "gpu"
STAGES = ("build", "check", "sanitize", "bench", "forecast", "table")
LIMIT = 590  # seconds of a stage
N_ROWS = 32_768
SHIFT_SIZES = ((3584, 65_536), (4096, 131_072), (2304, 16_384))
TOP_K_SIZES = ((3584, 65_536), (3584, 131_072))
CHUNK = 4096  # rows of a dense peer's chunk
ROUNDS = 7

Record = dict[str, Any]


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--stage"]:
        sys.path.insert(0, str(BUILT))
        print(json.dumps(globals()[f"stage_{arguments[1]}"]()), flush=True)
        return 0
    unknown = set(arguments) - set(STAGES)
    if unknown:
        print(f"error: there is no stage {unknown.pop()}: give any of {', '.join(STAGES)}", file=sys.stderr)
        return 2
    reason = missing()
    if reason is not None:
        print(f"make gpu: skipped, {reason}")
        return 0
    import torch

    name = torch.cuda.get_device_name()
    path = ROOT / "benchmarks" / "results" / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"
    document: Record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"kind": "gpu"}
    document["machine"] = {"gpu": name, "torch": torch.__version__, "cuda": torch.version.cuda}
    failed = False
    for stage in arguments or STAGES:
        found = run_stage(stage)
        found["date"] = datetime.now(UTC).isoformat(timespec="seconds")
        document[stage] = found
        new = path.with_suffix(".new")
        new.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        new.replace(path)
        failed |= "error" in found
        if failed and stage == "build":
            break
    print_table(document)
    print(f"saved in {path.relative_to(ROOT)}")
    return 1 if failed else 0


def missing() -> str | None:
    """Why nothing can be done here; None where it can."""
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError:
        return "this Python has no torch"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").exists():
        return "there is no nvcc on the PATH"
    return None


def run_stage(stage: str) -> Record:
    """In a process of its own, so that one stage's fault is not the next one's."""
    print(f"--- {stage}", flush=True)
    start = time.perf_counter()
    try:
        ran = subprocess.run(
            [sys.executable, "-m", "benchmarks.gpu", "--stage", stage],
            cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=LIMIT, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"error": f"not done within {LIMIT} seconds"}
    *printed, last = ran.stdout.strip().split("\n") or [""]
    print("\n".join(printed), flush=True)
    found: Record = json.loads(last) if ran.returncode == 0 else {"error": last[-500:]}
    if "error" in found:
        print(f"{stage}: {found['error']}", flush=True)
    return found | {"seconds": round(time.perf_counter() - start, 1)}


def stage_build() -> Record:
    import torch

    major, minor = torch.cuda.get_device_capability()
    architecture = "90a-real" if (major, minor) == (9, 0) else f"{major}{minor}-real"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--no-index"]
    command += ["--upgrade", "--target", str(BUILT), "-C", "cmake.define.STS_CUDA=ON"]
    command += ["-C", f"cmake.define.STS_CUDA_ARCHITECTURES={architecture}", str(ROOT)]
    environment = os.environ | {"PATH": f"{os.environ['PATH']}:/usr/local/cuda/bin"}
    subprocess.run(command, check=True, env=environment, stdout=sys.stderr)
    library = next((BUILT / "sts_fast" / "ops").glob("_cuda*.so"))
    return {"architecture": architecture, "megabytes": round(library.stat().st_size / 1e6, 2)}


def stage_check() -> Record:
    environment = os.environ | {"PYTHONPATH": str(BUILT)}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-o", "filterwarnings=default", "-p", "no:cacheprovider"]
    command += ["tests/ops/test_cuda.py", "tests/ops/test_sum_by_prompt.py", "-k", "not emulator"]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    print(ran.stdout[-1500:])
    if ran.returncode:
        return {"error": ran.stdout.strip().split("\n")[-1]}
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)  # then torch.empty is filled with not-a-numbers
    errors = {f"{loop} {what}": error for loop in main_loops() for what, error in random_problems(loop)}
    allowed = {"fp32": 1e-5, "bf16x2": 1e-4, "graph": 1e-4, "float64": 1e-12}
    wrong = {what: error for what, error in errors.items() if not error <= allowed[what.split()[1]]}
    found: Record = {"tests": ran.stdout.strip().split("\n")[-1], "relative_errors": errors}
    return found | ({"error": f"wrong results: {wrong}"} if wrong else {})


def main_loops() -> list[str]:
    import torch

    return ["sm80", "sm90"] if torch.cuda.get_device_capability() == (9, 0) else ["sm80"]


def random_problems(loop: str) -> Iterator[tuple[str, float]]:
    """(what, largest relative error of a column's sum where no firing is within rounding of its threshold)."""
    import torch

    from sts_fast.ops import cuda

    cuda.MAIN_LOOP = loop
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"{loop}: seed {seed}", flush=True)
    for d_in, d_sae, rows in ((768, 5_000, 3_001), (2304, 16_384, 1_000)):
        for precision in ("fp32", "bf16x2"):
            problem = Problem(d_in, d_sae, rows, "jumprelu", precision, seed)
            yield f"{precision} shift {d_in}x{d_sae}", problem.shift_error(problem.shift())
            yield f"{precision} moments {d_in}x{d_sae}", problem.moments_error()
            top = Problem(d_in, d_sae, rows, "topk", precision, seed)
            yield f"{precision} topk {d_in}x{d_sae}", top.top_k_error()
            yield f"float64 prompts' sums {d_in}x{d_sae}, {precision}", problem.by_prompt_error()
    problem = Problem(768, 5_000, 3_001, "jumprelu", "bf16x2", seed)
    sums = problem.new_sums()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    problem.shift(sums)  # a first call makes what is made once
    with torch.cuda.graph(graph, stream=stream):
        problem.shift(sums)
    for values in sums.values():
        values.zero_()
    graph.replay()
    yield "graph shift", problem.shift_error(sums)


def stage_sanitize() -> Record:
    tool = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if tool is None:
        return {"skipped": "there is no compute-sanitizer"}
    found: Record = {}
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-m", "benchmarks.gpu"]
        ran = subprocess.run(
            [*command, "--stage", "small"],
            cwd=ROOT, capture_output=True, text=True, check=False, timeout=LIMIT // 2 - 5,
        )  # fmt: skip
        print(ran.stdout[-800:], flush=True)
        found[check] = "no errors" if ran.returncode == 0 else f"exit code {ran.returncode}"
        if ran.returncode:
            found["error"] = f"{check}: {(ran.stdout + ran.stderr)[-300:]}"
    return found


def stage_small() -> Record:
    """Every kernel once, on ragged shapes: what the sanitizer watches."""
    from sts_fast.ops import cuda

    for cuda.MAIN_LOOP in main_loops():
        for precision in ("fp32", "bf16x2"):
            for activation in ("jumprelu", "topk"):
                problem = Problem(70, 300, 150, activation, precision)
                problem.shift()
                problem.moments()
                problem.sparse()
                problem.by_prompt()
    return {}


def stage_bench() -> Record:
    import torch

    rows = []
    for d_in, d_sae in SHIFT_SIZES:
        for case in (shift_case, moments_case):
            rows += timed(case(d_in, d_sae), {"d_in": d_in, "d_sae": d_sae, "rows": N_ROWS})
            torch.cuda.empty_cache()
    for d_in, d_sae in TOP_K_SIZES:
        rows += timed(top_k_case(d_in, d_sae), {"d_in": d_in, "d_sae": d_sae, "rows": N_ROWS})
        torch.cuda.empty_cache()
    return {"timings": rows}


Contestants = dict[str, Callable[[], Any]]


def shift_case(d_in: int, d_sae: int) -> tuple[str, Contestants]:
    """Seven statistics of a jumprelu SAE over pairs of bfloat16 rows; the product alone is the floor."""
    import torch

    problems = {p: Problem(d_in, d_sae, N_ROWS, "jumprelu", p, dtype=torch.bfloat16) for p in ("bf16", "bf16x2")}
    problem = problems["bf16"]
    W_bf16, W_fp32 = problem.W_enc, problems["bf16x2"].W_enc
    for each in problems.values():
        error = each.shift_error(each.shift())
        assert error <= 1e-4, f"{each.precision} is off by {error}"
    out = torch.empty(CHUNK, d_sae, dtype=torch.bfloat16, device="cuda")

    def product() -> None:
        for acts in (problem.base, problem.other):
            for part in acts.split(CHUNK):
                torch.mm(part, W_bf16, out=out[: len(part)])

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
        "ours, bf16": problem.shift,
        "bare product, bf16": product,
        "torch eager, bf16": lambda: eager(W_bf16),
        "torch.compile in chunks, bf16": lambda: eager(W_bf16, compiled, 2048),
        "ours, bf16x2": problems["bf16x2"].shift,
        "torch eager, float32": lambda: eager(W_fp32),
    }


def moments_case(d_in: int, d_sae: int) -> tuple[str, Contestants]:
    import torch

    problem = Problem(d_in, d_sae, N_ROWS, "jumprelu", "bf16", dtype=torch.bfloat16)
    error = problem.moments_error()
    assert error <= 1e-4, f"off by {error}"
    out = torch.empty(CHUNK, d_sae, dtype=torch.bfloat16, device="cuda")

    def product() -> None:
        for part in problem.base.split(CHUNK):
            torch.mm(part, problem.W_enc, out=out[: len(part)])

    return f"correlation, K = {TARGETS}", {"ours, bf16": problem.moments, "bare product, bf16": product}


def top_k_case(d_in: int, d_sae: int) -> tuple[str, Contestants]:
    import torch

    problem = Problem(d_in, d_sae, N_ROWS, "topk", "bf16", dtype=torch.bfloat16)
    error = problem.top_k_error()
    assert error <= 1e-4, f"off by {error}"
    out = torch.empty(CHUNK, d_sae, dtype=torch.bfloat16, device="cuda")

    def product(then: Any = None) -> None:
        for part in problem.base.split(CHUNK):
            torch.mm(part, problem.W_enc, out=out[: len(part)])
            if then:
                then(out[: len(part)])

    return f"topk, k = {TOP_K}", {
        "ours, bf16": problem.sparse,
        "bare product, bf16": product,
        "product, then torch.topk": lambda: product(lambda pre: torch.topk(pre, TOP_K, dim=1, sorted=False)),
    }


def timed(case: tuple[str, Contestants], about: Record, floor_name: str = "bare product, bf16") -> list[Record]:
    """Contestants in turn, round after round: the median, its ratio to the floor, peak memory beside the inputs."""
    import torch

    op, contestants = case
    times: dict[str, list[float]] = {name: [] for name in contestants}
    memory = {}
    for name, run in contestants.items():
        run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        memory[name] = torch.cuda.max_memory_allocated() - before
    for _ in range(ROUNDS):
        for name, run in contestants.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end))
    floor = statistics.median(times[floor_name])
    rows = []
    for name, milliseconds in times.items():
        median = statistics.median(milliseconds)
        rows.append(
            {"op": op, **about, "contestant": name, "milliseconds": [round(t, 3) for t in milliseconds]}
            | {"median": round(median, 3), "of_floor": round(median / floor, 3), "bytes": memory[name]}
        )
        print(f"{op} {about['d_in']}x{about['d_sae']} {name}: {median:.2f} ms, {median / floor:.3f}", flush=True)
    return rows


def stage_forecast() -> Record:
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
    return {"timings": timed(("forecast", stages), {"d_in": 3584, "d_sae": 65_536, "rows": 16_384}, "forward")}


def stage_table() -> Record:
    """A whole forecast; its checked and timed parts, and memory on the device, as bench_forecast has them."""
    from benchmarks.bench_forecast import SEVEN_B, measured

    return measured(SEVEN_B, rounds=3, threads=os.cpu_count() or 1)


def print_table(document: Record) -> None:
    for stage in STAGES:
        found = document.get(stage, {})
        if stage not in ("bench", "forecast") or "error" in found:
            state = found.get("error") or found.get("tests") or found.get("skipped") or "done" if found else "not run"
            print(f"{stage:9} {state}")
    for row in [*document.get("bench", {}).get("timings", []), *document.get("forecast", {}).get("timings", [])]:
        size = f"{row['d_in']}x{row['d_sae']}"
        print(
            f"{row['op']:20} {size:12} {row['contestant']:30} {row['median']:9.2f} ms "
            f"{row['of_floor']:7.3f} {row['bytes'] / 1e6:9.0f} MB"
        )
    table = document.get("table", {})
    if "wall" in table:
        wall, memory = table["wall"], table["memory_bytes"]
        shift, score = (wall["over_floor"][stage] for stage in ("shift", "score"))
        print(f"forecast over bare passes: shift {shift:.3f}, score {score:.3f}")
        print(f"each query alone over ours, shift: {wall['alone_over_ours']:.1f}")
        print(f"published way over ours: {wall['authors_over_ours']:.1f} in time, ", end="")
        print(f"{memory['authors'] / memory['ours']:.1f} in memory ({memory['ours'] / 1e6:.0f} MB ours)")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
