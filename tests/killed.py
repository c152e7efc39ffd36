"""Runs commands in processes of their own, which are killed before a pass of the whole model."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import LlamaForCausalLM

from sts_fast.cli import main

# Each is forked from a server that has imported what takes long, and computed nothing.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["sts_fast.cli", "transformers.models.llama.modeling_llama", "pyarrow.parquet", "scipy.special", "jinja2"]
)


@dataclass(frozen=True)
class Ended:
    """An ended process.

    code: of its exit, below zero for a signal; n_passes: of the whole model that it ran; err: its standard error
    """

    code: int
    n_passes: int
    err: str


def run(words: list[object], folder: Path, *, most_passes: int | None = None) -> Ended:
    """`sts-fast WORDS`, killed before it runs a pass more than it may; folder: for what it tells."""
    process = PROCESSES.Process(target=_run, args=([str(word) for word in words], folder, most_passes))
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return Ended(process.exitcode, int((folder / "passes").stat().st_size), (folder / "err").read_text())


def _run(words: list[str], folder: Path, most_passes: int | None) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    forward, n_passes = LlamaForCausalLM.forward, 0
    passes = os.open(folder / "passes", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def counted(self: LlamaForCausalLM, *args: Any, **options: Any) -> Any:
        nonlocal n_passes
        if n_passes == most_passes:
            os.kill(os.getpid(), signal.SIGKILL)
        n_passes += 1
        os.write(passes, b".")
        return forward(self, *args, **options)

    LlamaForCausalLM.forward = counted
    sys.argv = ["sts-fast", *words]
    main()


def lasting(folder: Path) -> dict[str, Any]:
    """What a folder of results holds, less when and how fast it was made."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content: Any = re.sub(rb"Made \d{4}-\d\d-\d\dT[\d:+]+", b"", path.read_bytes())
        if path.name == "scores.json":
            content = json.loads(content)
            for name in ("created_at", "forward_passes"):
                del content["provenance"][name]
        found[str(path.relative_to(folder))] = content
    return found
