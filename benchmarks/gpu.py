"""Builds, checks and times the CUDA core on the GPU of this machine: `make gpu`.

    python3 -m benchmarks.gpu                         all stages
    python3 -m benchmarks.gpu build check bench       these
    python3 -m benchmarks.gpu --seconds 560 --output DIR

Needs a torch with CUDA, nvcc, and what pyproject.toml names under build-system, all installed; no network. It is made
for a GPU that is lent for minutes: a stage runs in processes of its own that are killed, with all that they have
started, when its time is over; no stage takes another one down, and main loops are apart from each other. What a stage
finds is saved the moment it is found, in benchmarks/results/<gpu>.json and, with --output, in DIR too, beside all that
was printed.

    build     the package for this GPU, into build/gpu
    check     larger and larger random problems, new ones every time, against float64, with memory poisoned before it is
              handed out; then the tests of the CUDA ops on the device. First the main loop for all GPUs, then Hopper's
    verify    the check that the package itself makes of its kernels before they serve
    bench     ours in each precision beside the bare product, in turns, checked first; each loop that passed its check
    forecast  a language model's forward passes with and without the statistics of what they compute
    table     a whole forecast with a Qwen2.5-7B-shaped model and an SAE 131,072 wide, beside its bare passes, queries
              run alone and the published way (see bench_forecast)
    graph     capture in a CUDA graph, several streams, each loop that passed its check
    peers     ours beside eager and compiled torch
    sanitize  compute-sanitizer's memcheck and racecheck over every kernel, on small shapes
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# Seconds that each may take; longer means that something hangs.
LIMITS = {
    "build": 240, "check": 90, "verify": 40, "bench": 120, "forecast": 60, "table": 200, "graph": 30, "peers": 120,
    "sanitize": 100,
}  # fmt: skip
SECONDS = 840  # of a lease of 15 minutes
LEAST = 15  # with less time left, a stage is not begun
RECORD = "\x1e"  # before a line of JSON, among what a stage prints
KEPT_LINES = 100  # of what a failed stage printed

Record = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A stage, or its part for a main loop or a tool."""

    stage: str
    variant: str = ""

    @property
    def name(self) -> str:
        return f"{self.stage} {self.variant}".strip()

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "benchmarks.gpu_stages", self.stage, self.variant]


class Document:
    """What is known of a GPU: a JSON file, and a copy, that are whole at any moment."""

    def __init__(self, name: str, folders: list[Path], machine: Record) -> None:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        self.paths = [folder / f"{name}.json" for folder in folders]
        known = self.paths[0]
        self.found: Record = json.loads(known.read_text(encoding="utf-8")) if known.exists() else {"kind": "gpu"}
        self.found["machine"] = machine

    def save(self) -> None:
        for path in self.paths:
            new = path.with_suffix(".new")
            new.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
            new.replace(path)

    def state(self, job: Job) -> str | None:
        """ "done", "failed", "skipped" or "running"; None where it was never begun."""
        state: str | None = self.found.get(job.name, {}).get("state")
        return state


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Builds, checks and times the CUDA core on this machine's GPU.")
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"any of {', '.join(LIMITS)}; else all")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for all of it; {SECONDS} unless given")
    parser.add_argument("--output", type=Path, help="a folder for the results and all that is printed")
    given = parser.parse_args(arguments)
    unknown = set(given.stages) - set(LIMITS)
    if unknown:
        print(f"error: there is no stage {unknown.pop()}: give any of {', '.join(LIMITS)}", file=sys.stderr)
        return 2
    reason = missing()
    if reason is not None:
        print(f"make gpu: skipped, {reason}")
        return 0
    machine = machine_here()
    name = re.sub(r"[^a-z0-9]+", "-", machine["gpu"].lower()).strip("-")
    document = Document(name, [RESULTS, *([given.output] if given.output else [])], machine)
    with open(given.output / f"{name}.log", "a") if given.output else contextlib.nullcontext() as log:
        done = run_jobs(given.stages or list(LIMITS), document, time.monotonic() + given.seconds, log)
    print_table(document)
    print("saved in " + " and ".join(map(str, document.paths)))
    return 0 if done else 1


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


def machine_here() -> Record:
    import torch

    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    return {"gpu": torch.cuda.get_device_name(), "capability": capability} | {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def jobs_of(stages: list[str], document: Document) -> Iterator[Job]:
    """In the order in which they tell most, if the time ends; what follows from checks is asked for after them."""
    hopper = document.found["machine"]["capability"] == "9.0"
    checks = [Job("check", loop) for loop in (("sm80", "sm90") if hopper else ("sm80",))]

    def passed() -> list[str]:
        """The best first; without a check, those that need none but their own."""
        return [check.variant for check in reversed(checks) if document.state(check) in ("done", None)]

    for stage in (stage for stage in LIMITS if stage in stages):
        if stage == "check":
            yield from checks
        elif stage in ("bench", "graph"):
            yield from (Job(stage, loop) for loop in passed())
        elif stage in ("forecast", "table", "peers"):
            yield from (Job(stage, loop) for loop in passed()[:1])
        elif stage == "sanitize":
            yield from (Job(stage, f"{tool} {loop}") for loop in passed() for tool in ("memcheck", "racecheck"))
        else:
            yield Job(stage)


def run_jobs(stages: list[str], document: Document, deadline: float, log: TextIO | None) -> bool:
    """Runs jobs one after the other; True where all of them end well."""
    done = True
    for job in jobs_of(stages, document):
        left = deadline - time.monotonic()
        found: Record = {"state": "running", "date": datetime.now(UTC).isoformat(timespec="seconds")}
        document.found[job.name] = found
        if left < LEAST:
            found |= {"state": "skipped", "why": "no time was left"}
            document.save()
            done = False
            continue
        document.save()
        run_job(job, found, min(LIMITS[job.stage], left), document.save, log)
        done &= found["state"] != "failed"
        if job.stage == "build" and not done:
            break
    return done


def run_job(job: Job, found: Record, limit: float, save: Callable[[], None], log: TextIO | None) -> None:
    """Fills `found` as the job finds something, and in the end with its state."""
    kept: deque[str] = deque(maxlen=KEPT_LINES)
    start = time.monotonic()

    def say(line: str) -> None:
        kept.append(line)
        for to in (sys.stdout, log):
            if to is not None:
                print(line, file=to, flush=True)

    def note(record: Record) -> None:
        merge(found, record)
        save()

    say(f"--- {job.name}, {limit:.0f} seconds at most")
    error = run_apart(job.command, limit, say, note)
    error = found.get("error") or error or (None if found.pop("finished", False) else "ended before it was finished")
    found["seconds"] = round(time.monotonic() - start, 1)
    found["state"] = "failed" if error else "skipped" if "why" in found else "done"
    if error:
        found |= {"error": error, "output": list(kept)}
        say(f"{job.name}: {error}")
    save()


def run_apart(
    command: list[str], limit: float, say: Callable[[str], None], note: Callable[[Record], None]
) -> str | None:
    """Runs a command in a process group of its own, and kills all of the group when the command ends or time is over.

    note(record) for each record the moment it is printed, say(line) for every other line, of stdout and stderr. Returns
    what went wrong, or None.
    """
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read(stream: TextIO) -> None:
        with stream:
            for line in stream:
                lines.put(line.rstrip("\n"))
        lines.put(None)

    def take(line: str) -> None:
        if not line.startswith(RECORD):
            say(line)
            return
        try:
            note(json.loads(line[1:]))
        except ValueError:
            say(line)  # it was cut off

    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True, env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    threading.Thread(target=read, args=(process.stdout,), daemon=True).start()
    deadline, at_end = time.monotonic() + limit, False
    try:
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(queue.Empty):
                line = lines.get(timeout=0.1)
                at_end = line is None
                if line is None:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(max(deadline - time.monotonic(), 0))
                    break
                take(line)
        in_time = process.poll() is not None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        try:
            process.wait(30)  # a driver takes its time to end a kernel that hangs
        except subprocess.TimeoutExpired:
            say(f"process {process.pid} was killed and does not end")
    with contextlib.suppress(queue.Empty):
        while not at_end and (line := lines.get(timeout=2)) is not None:
            take(line)
    if not in_time:
        return f"not done within {limit:.3g} seconds"
    code = process.returncode
    return None if code == 0 else f"killed by signal {-code}" if code < 0 else f"exit code {code}"


def merge(found: Record, more: Record) -> None:
    """Lists grow, records within records too, and other values are replaced."""
    for key, value in more.items():
        if isinstance(value, list):
            found.setdefault(key, []).extend(value)
        elif isinstance(value, dict):
            merge(found.setdefault(key, {}), value)
        else:
            found[key] = value


def print_table(document: Document) -> None:
    jobs = {name: found for name, found in document.found.items() if name.split()[0] in LIMITS}
    for name, found in jobs.items():
        about = found.get("error") or found.get("why") or found.get("tests") or ""
        print(f"{name:24} {found['state']:8} {found.get('seconds', 0):6.1f} s  {about}")
    for name, found in jobs.items():
        for row in found.get("timings", []):
            print(
                f"{name:14} {row['op']:22} {row['d_in']}x{row['d_sae']:<8} {row['contestant']:32} "
                f"{row['median']:9.2f} ms {row['of_floor']:7.3f} {row['bytes'] / 1e6:9.0f} MB"
            )
        if "wall" in found and "memory_bytes" in found:
            wall, memory = found["wall"], found["memory_bytes"]
            shift, score = (wall["over_floor"][stage] for stage in ("shift", "score"))
            print(f"forecast over bare passes: shift {shift:.3f}, score {score:.3f}")
            print(f"each query alone over ours, shift: {wall['alone_over_ours']:.1f}")
            print(f"published way over ours: {wall['authors_over_ours']:.1f} in time, ", end="")
            print(f"{memory['authors'] / memory['ours']:.1f} in memory ({memory['ours'] / 1e6:.0f} MB ours)")


def exit_when_told() -> None:
    """A signal to end then kills what was started, too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


if __name__ == "__main__":
    exit_when_told()
    sys.exit(main(sys.argv[1:]))
