"""Kills, stops and starves the processes that read a plan: in the end the profiles are the same bytes.

    make faults                              100 kills of workers and drivers, and other accidents
    PYTHONPATH=tests python tests/faults/machines.py --kills 10 --others 0 --seed 7 --executor local

Disks are filled where one can be mounted in memory, as root.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tiny
from accidents import ROOMY, can_mount, mounted
from planned import typed
from process import State, state

MARK = "STS_FAULTS"  # in the environment of all processes of an accident, by which they are found
MOST_SECONDS = 240  # of one command
GONE_SECONDS = 20  # until nothing runs after its end
RAYS_OWN = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")  # Ray leaves them behind a driver that got SIGKILL
LOST = ("was killed", "was lost")


@dataclass
class Setting:
    """Where accidents happen, and what an undisturbed run leaves."""

    root: Path
    tiny: tiny.Tiny
    mark: str
    executors: list[str]

    def words(self, library: Path, executor: str, *more: str) -> list[str]:
        words = typed(self.tiny, library)
        words[words.index("--shard-tokens") + 1] = "250"
        return [sys.executable, "-m", "sts_fast", *words, "--executor", executor, "--workers", "2", *more]

    @cached_property
    def whole(self) -> State:
        library = self.root / "whole"
        _, err = self.run(library, "local")
        assert "error" not in err, err
        return state(library)

    def start(self, library: Path, executor: str, *more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.words(library, executor, *more), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            start_new_session=True, env={**os.environ, MARK: self.mark, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )  # fmt: skip

    def run(self, library: Path, executor: str, *more: str) -> tuple[int, str]:
        return ended(self.start(library, executor, *more))

    def processes(self, *titles: str) -> list[int]:
        """Those of this accident, with one of these words in their command line; of none: all."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"{MARK}={self.mark}\0".encode() in (folder / "environ").read_bytes():
                    line = (folder / "cmdline").read_bytes().decode()
                    found += [int(folder.name)] if not titles or any(title in line for title in titles) else []
        return found

    def workers(self) -> list[int]:
        return self.processes("spawn_main", "ray::read_shard")

    def is_whole(self, library: Path) -> list[str]:
        """What differs from an undisturbed run, and what still runs."""
        differs = sorted(name for name, _ in {*state(library).items()} ^ {*self.whole.items()})
        return [*([f"other bytes: {differs}"] if differs else []), *self.left()]

    def left(self) -> list[str]:
        until = time.monotonic() + GONE_SECONDS
        while (found := {*self.processes()} - {*self.processes(*RAYS_OWN)}) and time.monotonic() < until:
            time.sleep(0.1)
        told = []
        for pid in found:
            with contextlib.suppress(OSError):
                told.append(f"left is {Path(f'/proc/{pid}/cmdline').read_bytes()!r}")
        for pid in self.processes():
            signalled(pid, signal.SIGKILL)
        return told

    def again(self, library: Path, executor: str) -> list[str]:
        """Runs the same command undisturbed."""
        code, err = self.run(library, executor)
        return [*([] if code == 0 else [f"the same command again ends with {code}: {err}"]), *self.is_whole(library)]


Accident = Callable[[Setting, Path, random.Random, Counter[str]], list[str]]


def ended(command: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit code, and standard error; a command that hangs is killed."""
    try:
        _, err = command.communicate(timeout=MOST_SECONDS)
    except subprocess.TimeoutExpired:
        command.kill()
        _, err = command.communicate()
        err += "\nIT HANGS"
    return command.returncode, err


def signalled(pid: int, number: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
        return True
    return False


def told_well(code: int, err: str, *words: str, traces: bool = False) -> list[str]:
    """Nothing where it ended well, or with exit code 2 and one error that has one of these words.

    traces: whether a traceback of a worker may stand before it, as of an interpreter that finds no memory to start in
    """
    last = (err.splitlines() or [""])[-1]
    n_errors = sum(line.startswith("error: ") for line in err.splitlines())
    is_told = code == 2 and last.startswith("error: ") and n_errors == 1 and any(word in last for word in words)
    return [] if (code == 0 or is_told) and (traces or "Traceback" not in err) else [f"ended with {code}: {err}"]


def kills(executor: str, n: int) -> Accident:
    """Of workers and drivers, until there were so many or the command has ended, over and over."""

    def killed(setting: Setting, library: Path, rng: random.Random, counts: Counter[str]) -> list[str]:
        told: list[str] = []
        left = n
        while True:
            command = setting.start(library, executor)
            begun = time.monotonic()
            while left and command.poll() is None and time.monotonic() - begun < MOST_SECONDS:
                if rng.random() < 0.25:
                    time.sleep(rng.uniform(0, 12))
                    if command.poll() is None and signalled(command.pid, signal.SIGKILL):
                        counts[f"drivers of {executor}"] += 1
                        left -= 1
                        command.wait()
                    break
                workers = setting.workers()
                if workers and signalled(rng.choice(workers), signal.SIGKILL):
                    counts[f"workers of {executor}"] += 1
                    left -= 1
                time.sleep(rng.uniform(0.2, 8))
            code, err = ended(command)
            if code == -signal.SIGKILL:
                told += setting.left()
            elif code == 0:
                return told + setting.is_whole(library)
            else:
                counts["shards left out"] += 1
                found = told_well(code, err, *LOST)
                if found:
                    return told + found

    return killed


def signals(setting: Setting, library: Path, rng: random.Random, counts: Counter[str]) -> list[str]:
    """SIGINT or SIGTERM, to the driver or to all of its group, as a terminal or a scheduler does."""
    executor = rng.choice(setting.executors)
    command = setting.start(library, executor)
    time.sleep(rng.uniform(4, 20))
    number, is_group = rng.choice((signal.SIGINT, signal.SIGTERM)), rng.random() < 0.5
    if command.poll() is None:
        (os.killpg if is_group else os.kill)(command.pid, number)
        counts[f"signals to {executor}"] += 1
    code, err = ended(command)
    told = told_well(code, err, "interrupted") + setting.left()
    return [f"{number.name} to {executor}, group {is_group}: {line}" for line in told] + setting.again(
        library, executor
    )


def slow(setting: Setting, library: Path, rng: random.Random, counts: Counter[str]) -> list[str]:
    """A worker that stands still for some seconds."""
    command = setting.start(library, "local")
    until = time.monotonic() + MOST_SECONDS
    while not setting.workers() and command.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    time.sleep(rng.uniform(0, 6))
    for pid in setting.workers()[:1]:
        if signalled(pid, signal.SIGSTOP):
            time.sleep(5)
            signalled(pid, signal.SIGCONT)
            counts["slow workers"] += 1
    code, err = ended(command)
    return ([] if code == 0 else [f"ended with {code}: {err}"]) + setting.is_whole(library)


def no_memory(setting: Setting, library: Path, rng: random.Random, counts: Counter[str]) -> list[str]:
    """Workers that may have no more memory than they have, or little more."""
    command = setting.start(library, "local")
    begun = time.monotonic()
    starved: set[int] = set()
    time.sleep(rng.uniform(3, 12))
    while command.poll() is None and time.monotonic() - begun < MOST_SECONDS and len(starved) < 4:
        for pid in {*setting.workers()} - starved:
            with contextlib.suppress(OSError):
                size = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
                limit = size + rng.randrange(1, 60 << 20)
                resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))
                starved.add(pid)
        time.sleep(0.2)
    counts["workers without memory"] += len(starved)
    code, err = ended(command)
    told = told_well(code, err, "memory", "killed", "allocate", "new thread", traces=True)
    counts["of these commands told"] += code == 2
    return told + setting.left() + setting.again(library, "local")


def full_disk(setting: Setting, library: Path, rng: random.Random, counts: Counter[str]) -> list[str]:
    """A library on a disk that fills up."""
    with mounted(library.with_name("disk")) as disk:
        subprocess.run(["mount", "-o", f"remount,size={rng.randrange(40, 700)}k", disk], check=True)
        code, err = setting.run(disk / "lib", "local")
        counts["full disks" if code else "had room"] += 1
        told = told_well(code, err, "No space left")
        subprocess.run(["mount", "-o", f"remount,rw,{ROOMY}", disk], check=True)
        return told + setting.left() + setting.again(disk / "lib", "local")


def damaged(setting: Setting, library: Path, rng: random.Random, counts: Counter[str]) -> list[str]:
    """Files that were cut off or changed between two runs, and a clock that was set back meanwhile."""
    shutil.copytree(setting.root / "whole", library)
    if rng.random() < 0.7:  # as before the sets were put together
        next(library.glob("plans/*/merged.json")).unlink()
        shutil.rmtree(next(library.glob("days-*")))
        ended(
            subprocess.Popen(
                [sys.executable, "-m", "sts_fast", "work", str(next(library.glob("plans/*"))), "--world", "2"],
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ, MARK: setting.mark},
            )
        )  # fmt: skip
    files = sorted(path for path in library.rglob("*") if path.is_file())
    for path in rng.sample(files, 4):
        content = bytearray(path.read_bytes())
        at = rng.randrange(len(content))
        content[at] ^= 1 << rng.randrange(8)
        path.write_bytes(content if rng.random() < 0.5 else content[:at])
        counts["damaged files"] += 1
    for path in files:
        os.utime(path, (moment := rng.uniform(0, 4e9), moment))
    return setting.again(library, "local")


def two_drivers(setting: Setting, library: Path, rng: random.Random, counts: Counter[str]) -> list[str]:
    """Of one plan, one after the other or at the same time."""
    one = setting.start(library, "local")
    time.sleep(rng.uniform(0, 10))
    other = setting.start(library, "local")
    counts["two drivers"] += 1
    told = [err for code, err in map(ended, (one, other)) if code != 0]
    return told + setting.is_whole(library)


def ranks(setting: Setting, library: Path, rng: random.Random, counts: Counter[str]) -> list[str]:
    """Three processes that work on one plan and end together; any of them merges."""
    setting.run(library, "local", "--plan-only")
    command = [sys.executable, "-m", "sts_fast", "work", str(next(library.glob("plans/*"))), "--world", "3"]
    processes = [
        subprocess.Popen(
            [*command, "--rank", str(rank)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env={**os.environ, MARK: setting.mark},
        )
        for rank in range(3)
    ]  # fmt: skip
    counts["ranks at once"] += 1
    return [err for code, err in map(ended, processes) if code != 0] + setting.is_whole(library)


def node_taken_away(setting: Setting, library: Path, rng: random.Random, counts: Counter[str]) -> list[str]:
    """A node of a Ray cluster that is gone at once, with its workers."""
    with cluster() as ray:
        nodes = [ray.add_node(num_cpus=1) for _ in range(2)]
        command = setting.start(library, "ray", "--address", ray.address)
        time.sleep(rng.uniform(6, 20))
        if command.poll() is None:
            ray.remove_node(nodes[0], allow_graceful=False)
            counts["nodes taken away"] += 1
        code, err = ended(command)
        told = [] if code == 0 else [f"ended with {code}: {err}"]
    return told + setting.is_whole(library)


@contextmanager
def cluster() -> Iterator[Any]:
    """A cluster of Ray whose nodes are processes of this machine."""
    from ray.cluster_utils import Cluster

    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        yield found
    finally:
        found.shutdown()


OTHERS: tuple[Accident, ...] = (signals, two_drivers, damaged, no_memory, slow, ranks, node_taken_away, full_disk)


def jobs(n_kills: int, n_others: int, executors: list[str]) -> list[tuple[str, Accident]]:
    """Kills, ten over one plan, and other accidents in turn."""
    found: list[tuple[str, Accident]] = [
        (f"kills of {executors[i % len(executors)]}", kills(executors[i % len(executors)], min(10, n_kills - 10 * i)))
        for i in range(-(-n_kills // 10))
    ]
    others = [accident for accident in OTHERS if accident is not full_disk or can_mount()]
    others = [accident for accident in others if accident is not node_taken_away or "ray" in executors]
    return found + [(of.__name__, of) for of in (others[i % len(others)] for i in range(n_others))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--others", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--executor", help="local or ray; repeatable", action="append")
    parser.add_argument("--only", help="an accident, such as signals; repeatable", action="append")
    parser.add_argument("--material", type=Path, help="folder of tests/tiny.py, where it is made already")
    options = parser.parse_args()
    counts, n_faults = Counter[str](), 0
    with tempfile.TemporaryDirectory() as folder:
        material = options.material or Path(folder) / "tiny"
        if options.material is None:
            tiny.make(material)
        mark = f"{os.getpid()}-{time.time_ns()}"
        setting = Setting(Path(folder), tiny.at(material), mark, options.executor or ["local", "ray"])
        assert setting.whole
        for number, (name, accident) in enumerate(jobs(options.kills, options.others, setting.executors)):
            if options.only is not None and name not in options.only:
                continue
            told = accident(setting, Path(folder) / f"lib-{number}", random.Random(f"{options.seed} {number}"), counts)
            n_faults += len(told)
            for line in told:
                print(f"{name} {number}: {line}", flush=True)
            shutil.rmtree(Path(folder) / f"lib-{number}", ignore_errors=True)
    print("\n".join(f"{name}: {n}" for name, n in sorted(counts.items())))
    print(f"{n_faults} faults")
    sys.exit(1 if n_faults else 0)


if __name__ == "__main__":
    main()
