"""Runs commands in forked processes, where everything is imported already, and ends them at a chosen moment."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sts_fast import files
from sts_fast.cli import main

# What tells when a run was made, how long it ran the model (one that goes on from an earlier one runs it less), and the
# digest of scores.json, which says both.
OF_TIME = re.compile(rb'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00|"forward_passes": {[^}]*}|"run": "[0-9a-f]{64}"')
TEXTS = (".json", ".html", ".yaml")
State = dict[str, str]
Words = tuple[str, ...]


@dataclass(frozen=True)
class Fault:
    """How a command is ended: by a signal after so many seconds, or by SIGKILL at a moment around a change of names.

    moment:    2i is right before, 2i + 1 right after the i-th change
    exchanges: whether the file system can exchange two names in one step
    """

    signal: int = signal.SIGKILL
    after: float | None = None
    moment: int | None = None
    exchanges: bool = True


@dataclass(frozen=True)
class Ended:
    """code: exit code, or minus the signal; moments: before and after each change of names; seconds: of wall clock"""

    code: int
    err: str
    moments: int
    seconds: float

    def refused(self, *words: str) -> bool:
        """True where it ended with exit code 2 and, at last, one line of an error that has these words."""
        last = (self.err.splitlines() or [""])[-1]
        is_told = last.startswith("error: ") and all(word in last for word in words)
        return self.code == 2 and is_told and "Traceback" not in self.err


def start(words: Words, folder: Path, fault: Fault = Fault()) -> Callable[[], Ended]:
    """Forks a process that runs a command in a folder; returns what waits for its end."""
    err = tempfile.TemporaryFile()  # noqa: SIM115
    pipe, tell = os.pipe()
    pid, began = os.fork(), time.monotonic()
    if pid == 0:
        _run(words, folder, fault, err.fileno(), tell)
    os.close(tell)

    def end() -> Ended:
        os.read(pipe, 1)  # the command begins
        if fault.after is not None:
            time.sleep(fault.after)
            os.kill(pid, fault.signal)
        moments = b"".join(iter(partial(os.read, pipe, 64), b""))
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.close(pipe)
        with err:
            err.seek(0)
            return Ended(code, err.read().decode(), int(moments or 0), time.monotonic() - began)

    return end


def run(words: Words, folder: Path, fault: Fault = Fault()) -> Ended:
    return start(words, folder, fault)()


def _run(words: Words, folder: Path, fault: Fault, err: int, tell: int) -> None:
    code, passed = 1, 0

    def passes() -> None:
        nonlocal passed
        if passed == fault.moment:
            os.kill(os.getpid(), signal.SIGKILL)
        passed += 1

    def around(change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*args: Any, **options: Any) -> Any:
            passes()
            result = change(*args, **options)
            passes()
            return result

        return changed

    try:
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(err, 2)
        if not fault.exchanges:
            files._exchanged = lambda first, second: False
        for module, name in ((os, "replace"), (os, "rename"), (files, "_exchanged"), (files, "_remove")):
            setattr(module, name, around(getattr(module, name)))
        sys.argv = ["sts-fast", *words]
        os.write(tell, b"r")
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        os.write(tell, str(passed).encode())
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def state(folder: Path) -> State:
    """SHA-256 of each file below a folder, without what tells of time; of links, where they lead."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file():
            content = path.read_bytes()
            content = OF_TIME.sub(b"", content) if path.suffix in TEXTS else content
            found[name] = hashlib.sha256(content).hexdigest()
    return found


def visible(found: State) -> State:
    """Without what has a name with a dot in front, or lies below such a folder."""
    return {name: digest for name, digest in found.items() if not name.startswith(".") and "/." not in name}


@contextmanager
def copied(folder: Path, to: Path) -> Iterator[Path]:
    """A copy, which is removed in the end."""
    shutil.copytree(folder, to, symlinks=True)
    try:
        yield to
    finally:
        shutil.rmtree(to)
