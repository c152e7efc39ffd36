"""A SLURM array that reads a plan's shards, and a job behind it that puts them together."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sts_fast import files
from sts_fast.errors import InputError, one_line
from sts_fast.profile.work.plan import ProfilePlan


@dataclass(frozen=True)
class Array:
    """Scripts of a plan's jobs. ranks: those whose shards are missing; of `world` ranks."""

    plan: ProfilePlan
    world: int
    ranks: tuple[int, ...]
    read: str
    merge: str

    @classmethod
    def of(cls, plan: ProfilePlan, n_workers: int, options: Sequence[str], roots: Mapping[str, str]) -> Array:
        """options: of sbatch, for both jobs, such as --partition=gpu."""
        world = min(n_workers, len(plan.shards))
        ranks = sorted({shard % world for shard in plan.missing()})
        command = [sys.executable, "-m", "sts_fast"]
        plan_file = str((plan.folder / "plan.json").absolute())
        mapped = [word for old, new in roots.items() for word in ("--root", f"{old}={new}")]
        logs = plan.folder.absolute() / "logs"
        name = f"--job-name=sts-{plan.key[:8]}"
        array = [f"--array={','.join(map(str, ranks))}", f"--cpus-per-task={plan.work.threads}", "--requeue"]
        read = _script(
            [name, *array, f"--output={logs}/%a.log", *options],
            [*command, "work", plan_file, "--rank", "$SLURM_ARRAY_TASK_ID", "--world", str(world), *mapped],
        )
        merge = _script([f"{name}-merge", f"--output={logs}/merge.log", *options], [*command, "merge", plan_file])
        return cls(plan, world, tuple(ranks), read, merge)

    def submit(self) -> list[str]:
        """Submits both jobs; returns their numbers. Raises InputError where sbatch is missing, or refuses them."""
        if shutil.which("sbatch") is None:
            raise InputError("--executor slurm needs sbatch, which is not on PATH: run it on a login node, or --print")
        (self.plan.folder / "logs").mkdir(exist_ok=True)
        read = self._sbatch("read.sh", self.read, [])
        return [read, self._sbatch("merge.sh", self.merge, [f"--dependency=afterany:{read}"])]

    def _sbatch(self, name: str, script: str, options: list[str]) -> str:
        path: Path = self.plan.folder / name
        with files.atomic_path(path) as temporary:
            temporary.write_text(script, encoding="utf-8")
        done = subprocess.run(
            ["sbatch", "--parsable", *options, str(path)], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise InputError(f"sbatch refuses {path}: {one_line(done.stderr)}")
        return done.stdout.strip().partition(";")[0]


def _script(options: Sequence[str], command: Sequence[str]) -> str:
    words = [word if word.startswith("$") else shlex.quote(word) for word in command]
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in options), "set -eu", " ".join(words)]
    return "\n".join(lines) + "\n"
