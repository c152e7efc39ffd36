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
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from sts_fast.data.progress import WHOLE

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


# Whether a command tells its result and warnings alone; of the process, as standard error is.
_quiet = False


def set_quiet(quiet: bool) -> None:
    """Lets only results, warnings and errors through."""
    global _quiet
    _quiet = quiet


def is_quiet() -> bool:
    return _quiet


class Interrupted(Exception):
    """An interrupt by Ctrl-C or SIGTERM; the message says what is left of the work."""


def fail(message: str) -> None:
    sys.stderr.write(f"error: {printable(' '.join(message.split()))}\n")
    sys.exit(2)


def show(text: str) -> None:
    sys.stderr.write(printable(text) + "\n")


def say(line: str, style: str = "dim") -> None:
    """A line on standard error; only a warning where the command is quiet."""
    is_warning = line.startswith("warning: ")
    if is_warning or not _quiet:
        err.print(line, style="yellow" if is_warning else style, highlight=False, markup=False, soft_wrap=True)


def note(line: str) -> None:
    """Tells where results are, and what to do with them; nothing where the command is quiet."""
    say(line, style="")


@contextmanager
def progress(unit: str = "prompts") -> Iterator[Tell]:
    """Bars on a terminal, that of the whole first; elsewhere, as in the log of a job, a line now and then."""
    if is_quiet():
        yield lambda stage, done, total: None
        return
    if not err.is_terminal:
        yield Lines(unit).tell
        return
    columns = (
        SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(),
        TextColumn("{task.fields[amount]}", markup=False), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=err, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def tell(stage: str, done: int, total: int) -> None:
            amount = f"{done / max(total, 1):.0%}" if stage == WHOLE else f"{done:,} of {total:,} {unit}"
            if stage not in tasks:
                tasks[stage] = bars.add_task(printable(stage), total=total, amount=amount)
            bars.update(tasks[stage], completed=done, amount=amount)

        yield tell


class Lines:
    """Progress as lines: one for a stage that is not done after LINE_SECONDS, and one for every LINE_SECONDS more.

    Each says how much of the whole is done too, where that is told of before the stage; see with_whole.
    """

    def __init__(self, unit: str) -> None:
        self.unit, self.stage, self.told = unit, "", time.monotonic()
        self.began = self.whole_began = self.told
        self.first = self.whole_first = 0
        self.whole: tuple[int, int] | None = None

    def tell(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage == WHOLE:
            if self.whole is None:
                self.whole_began, self.whole_first = now, done
            self.whole = done, total
            return
        if stage != self.stage:
            self.stage, self.began, self.first = stage, now, done
        if now - self.told < LINE_SECONDS or done >= total:
            return
        self.told, rate = now, (done - self.first) / max(now - self.began, 1e-9)
        left = f", {rate:.3g} a second, {(total - done) / rate:,.0f} s left" if rate > 0 else ""
        show(f"{printable(stage)}: {done:,} of {total:,} {self.unit}{left}{self._of_whole(now)}")

    def _of_whole(self, now: float) -> str:
        if self.whole is None:
            return ""
        done, total = self.whole
        seconds = (now - self.whole_began) * (total - done) / max(done - self.whole_first, 1)
        left = f", {duration(seconds)} left" if done > self.whole_first else ""
        return f"; {done / max(total, 1):.0%} of {WHOLE}{left}"


def duration(seconds: float) -> str:
    """A time in its unit: '40 s', '3 min', '2.5 h'."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def printable(text: str) -> str:
    """Text from a file, which may hold escape sequences, as it can be shown: each control character as a symbol."""
    return CONTROL.sub(lambda found: chr(0x2400 + ord(found[0])) if ord(found[0]) < 32 else "\ufffd", text)
