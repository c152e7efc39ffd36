"""Output of the command line: results on standard output, everything else on standard error."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from sts_fast.data.prompts import Progress as Tell

out = Console()
err = Console(stderr=True)

BAR_WIDTH = 12
# Of bars that go both ways.
SIDE_WIDTH = 8


def fail(message: str) -> None:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    sys.exit(2)


def show(text: str) -> None:
    sys.stderr.write(text + "\n")


def say(line: str) -> None:
    style = "yellow" if line.startswith("warning: ") else "dim"
    err.print(line, style=style, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def progress(unit: str = "prompts") -> Iterator[Tell]:
    if not err.is_terminal:
        yield lambda stage, done, total: None
        return
    columns = (
        SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
        TextColumn(unit), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=err, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def tell(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)

        yield tell
