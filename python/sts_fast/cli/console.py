"""Output of the command line: results on standard output, everything else on standard error."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import rich.table
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from sts_fast.data.prompts import Progress as Tell


class VisibleConsole(Console):
    """A console that shows the control characters of texts, which may come from files, instead of sending them."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(printable(text) if isinstance(text, str) else text for text in objects), **options)


class Table(rich.table.Table):
    """A table whose title and cells show control characters likewise."""

    def __init__(self, *, title: str | None = None, **options: Any) -> None:
        super().__init__(title=None if title is None else printable(title), **options)

    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*(printable(cell) if isinstance(cell, str) else cell for cell in cells), **options)

    def add_column(self, header: Any = "", *parts: Any, **options: Any) -> None:
        super().add_column(printable(header) if isinstance(header, str) else header, *parts, **options)


out = VisibleConsole()
err = VisibleConsole(stderr=True)

LINE_SECONDS = 30
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def fail(message: str) -> None:
    sys.stderr.write(f"error: {printable(' '.join(message.split()))}\n")
    sys.exit(2)


def show(text: str) -> None:
    sys.stderr.write(printable(text) + "\n")


def say(line: str) -> None:
    style = "yellow" if line.startswith("warning: ") else "dim"
    err.print(line, style=style, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def progress(unit: str = "prompts") -> Iterator[Tell]:
    """Bars on a terminal; elsewhere, as in the log of a job, a line now and then."""
    if not err.is_terminal:
        yield Lines(unit).tell
        return
    columns = (
        SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
        TextColumn(unit), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=err, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def tell(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(printable(stage), total=total)
            bars.update(tasks[stage], completed=done)

        yield tell


class Lines:
    """Progress as lines: one for a stage that is not done after LINE_SECONDS, and one for every LINE_SECONDS more."""

    def __init__(self, unit: str) -> None:
        self.unit, self.stage, self.began, self.first, self.told = unit, "", 0.0, 0, time.monotonic()

    def tell(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage != self.stage:
            self.stage, self.began, self.first = stage, now, done
        if now - self.told < LINE_SECONDS or done >= total:
            return
        self.told, rate = now, (done - self.first) / max(now - self.began, 1e-9)
        left = f", {rate:.3g} a second, {(total - done) / rate:,.0f} s left" if rate > 0 else ""
        show(f"{printable(stage)}: {done:,} of {total:,} {self.unit}{left}")


def printable(text: str) -> str:
    """Text from a file, which may hold escape sequences, as it can be shown: each control character as a symbol."""
    return CONTROL.sub(lambda found: chr(0x2400 + ord(found[0])) if ord(found[0]) < 32 else "\ufffd", text)
