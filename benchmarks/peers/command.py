"""Packages that answer the same questions: what each takes, and how right it is, on the same rows in one run.

    pip install --no-deps -r benchmarks/peers.txt   in an environment that has sts-fast and its `dev` packages
    python -m benchmarks peers                      measures, writes results/peers.json and the tables of README.md
    python -m benchmarks peers --questions topk     this one again
    python -m benchmarks peers --write-tables       the tables alone, from results/peers.json

On one thread. A peer that is not installed is skipped by its name.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import memory, records, tables, timing
from benchmarks.cases import Contestant
from benchmarks.oracle import WrongResult
from benchmarks.peers import encode, influence, texts
from benchmarks.peers.question import Question, package, release

QUESTIONS: dict[str, Callable[[], Question]] = {
    "topk": encode.topk,
    "relu": encode.relu,
    "texts": texts.texts,
    "influence": influence.influence,
}
RESULTS, KIND = records.RESULTS / "peers.json", "peers"
CLOSE = 1.05


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--questions", nargs="+", choices=QUESTIONS, default=list(QUESTIONS), metavar="QUESTION",
                        help=", ".join(QUESTIONS))  # fmt: skip
    parser.add_argument(
        "--seconds", type=float, default=12.0, help="a question is repeated for so long, and three times"
    )
    parser.add_argument("--results", type=Path, metavar="PATH", help="file to write instead of results/peers.json")
    parser.add_argument("--write-tables", action="store_true", help="only that")
    options = parser.parse_args(arguments)
    path = options.results or RESULTS
    if not options.write_tables:
        for name in options.questions:
            try:
                with quiet():
                    record = measure(QUESTIONS[name](), options.seconds)
            except WrongResult as error:
                print(f"error: {error}", file=sys.stderr)
                return 2
            print(table(record), flush=True)
            keep(path, name, record)
    if path == RESULTS:
        for page, text in pages():
            page.write_text(tables.between_markers(page.read_text(encoding="utf-8"), text, KIND), encoding="utf-8")
    return 0


@contextmanager
def quiet() -> Iterator[None]:
    """Without the bars and messages of peers."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stderr(nowhere):
            yield
    finally:
        logging.disable(before)


def measure(question: Question, seconds: float) -> dict[str, Any]:
    """Times and checks every contestant; names those that could not be asked, and why."""
    timing.set_num_threads(1)
    there, skipped = [], dict(question.lacking)
    extra: dict[str, int] = {}
    for contestant in question.contestants:
        try:
            release(contestant.name)
            # in a process of its own, before this one prepares anything
            extra[contestant.name] = memory.in_a_fork(partial(extra_bytes, question, contestant))
            contestant.prepare()
        except ImportError as error:
            skipped[contestant.name] = f"not installed ({error})"
            continue
        contestant.run(*question.warm_up, lap=ignored)
        there.append(contestant)
    right: dict[str, float | None] = {}

    def check(name: str, result: Any, inputs: tuple[Any, ...]) -> float:
        right[name] = None if question.r is None else question.r(result)
        return question.check(name, result, inputs)

    timed = timing.in_turn(there, question.inputs, check, seconds)
    for name, contestant in timed["contestants"].items():
        del contestant["parts"]
        contestant |= {"version": release(name), "extra_bytes": extra[name], "r": right[name]}
    return {"asked": question.asked, **timed, "skipped": skipped}


def extra_bytes(question: Question, contestant: Contestant) -> int:
    contestant.prepare()
    contestant.run(*question.warm_up, lap=ignored)
    return memory.extra_resident(contestant.run, question.inputs)


def ignored(part: str) -> None:
    """Parts of a run are not timed."""


def keep(path: Path, name: str, record: dict[str, Any]) -> None:
    """Replaces the earlier record of a question. The file is replaced as a whole."""
    document = load(path)
    document["machine"] = records.machine("cpu")
    found = {**document["questions"], name: record}
    document["questions"] = {each: found[each] for each in QUESTIONS if each in found}
    records.write(path, document)


def load(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {"kind": KIND, "machine": {}, "questions": {}}
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


# ---- tables


def pages() -> list[tuple[Path, str]]:
    document = load(RESULTS)
    about = document["machine"]
    if not about:
        return []
    text = f"\n{about['processor']}, {about['instruction_set']}; torch {about['torch']}, one thread.\n"
    return [(tables.README, text + "".join(f"\n{table(record)}" for record in document["questions"].values()))]


def table(record: dict[str, Any]) -> str:
    """A question's contestants, who is ahead in what, and who is missing."""
    contestants = record["contestants"]
    ours = next(iter(contestants))
    has_r = any(each["r"] is not None for each in contestants.values())
    head = ["", "processor ms", "clock ms", f"processor time / {ours}", "extra MB", "error", *["r"] * has_r]
    rows = [
        [
            f"{name} ({package(name)} {each['version']})" if not name.startswith(tables.OURS) else name,
            *(f"{tables.median(record, name, field) * 1e3:,.0f}" for field in ("cpu_seconds", "seconds")),
            f"{tables.ratio(record, name, ours, 'cpu_seconds'):.2f}",
            f"{each['extra_bytes'] / 1e6:,.1f}",
            f"{each['error']:.0e}",
            *([f"{each['r']:.2f}"] if has_r else []),
        ]
        for name, each in contestants.items()
    ]
    text = f"**{record['asked']}** ({record['date'][:10]}; {tables.others(record)} meanwhile)\n\n"
    text += tables.markdown(head, rows) + f"\n{ahead(record, has_r)}\n"
    return text + "".join(f"Not here: {name}, {why}.\n" for name, why in record["skipped"].items())


def ahead(record: dict[str, Any], has_r: bool) -> str:
    """Who needs least and who is most right; those within 5% of the best are named with it."""
    of = record["contestants"]
    time = {name: tables.median(record, name, "cpu_seconds") for name in of}
    space = {name: float(each["extra_bytes"]) for name, each in of.items()}
    said = [f"Least processor time: {least(time)}", f"least memory: {least(space)}"]
    if has_r:
        said.append(f"highest r: {least({name: -each['r'] for name, each in of.items()})}")
    return "; ".join(said) + "."


def least(values: dict[str, float]) -> str:
    smallest = min(values.values())
    border = smallest * CLOSE if smallest > 0 else smallest / CLOSE
    return ", ".join(f"**{name}**" for name, value in values.items() if value <= border)
