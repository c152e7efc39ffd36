"""The summary of OpenCompass: summary_TIME.csv, .md or .txt, with percentages."""

from __future__ import annotations

import csv
import re
from pathlib import Path

from sts_fast.errors import InputError, listed
from sts_fast.outcomes.evaluation import EvaluatedModel, Evaluation, Result, Task, finite, read_text
from sts_fast.outcomes.metrics import is_accuracy

HEADER = ["dataset", "version", "metric", "mode"]
TIME = re.compile(r"\d{8}_\d{6}|\d{8}")


def recognises(path: Path) -> bool:
    """True for a table or text that contains the summary's header."""
    if path.suffix.lower() not in (".csv", ".md", ".txt"):
        return False
    return _find_table(read_text(path).splitlines()) is not None


def read(path: Path, model: str | None = None) -> Evaluation:
    """The metrics of a model, or of the only one in it; a cell '-' is a dataset that was not evaluated."""
    table = _find_table(read_text(path).splitlines())
    if table is None:
        raise InputError(f"{path} has no line {','.join(HEADER)},MODEL of OpenCompass's summary")
    header, rows = table[0], table[1:]
    models = header[len(HEADER) :]
    if model not in models and (model is not None or len(models) > 1):
        raise InputError(f"{path} contains the models {listed(models)}: choose one, as {path}:{models[0]}")
    model = models[0] if model is None else model
    column = header.index(model, len(HEADER))
    evaluation = Evaluation(time=_time_of(path))
    results: dict[str, dict[str, Result]] = {}
    made: dict[str, dict[str, str]] = {}
    missing = []
    for row in rows:
        if len(row) != len(header):
            raise InputError(f"{path}: the row of '{row[0]}' has {len(row)} cells, not {len(header)}: give the .csv")
        (name, version, metric, mode), cell = row[: len(HEADER)], row[column]
        if cell == "-":
            missing.append(name)
            continue
        value = _number(path, name, cell)
        result = Result(value / 100, metric, percent=False) if is_accuracy(metric) else Result(value, metric)
        results.setdefault(name, {}).setdefault(metric, result)
        # The same rows of a dataset have the same version, a hash of its prompt.
        settings = {"harness": "OpenCompass", "task": name, "version of the prompt": version, "mode": mode}
        made[name] = {key: value for key, value in settings.items() if value != "-"}
    evaluation.tasks = {
        name: Task(of_task, None, made[name], EvaluatedModel(model)) for name, of_task in results.items()
    }
    if not results:
        raise InputError(f"{path} has no dataset with a value")
    if missing:
        evaluation.warnings.append(f"{path} has no value, and leaves out {listed(missing)}")
    return evaluation


def _find_table(lines: list[str]) -> list[list[str]] | None:
    """Header and rows, of CSV or of a Markdown table; in the text, which has both, of the CSV."""
    for at, line in enumerate(lines):
        is_markdown = line.lstrip().startswith("|")
        header = _cells(line, is_markdown=is_markdown)
        if [cell.lower() for cell in header[: len(HEADER)]] == HEADER and len(header) > len(HEADER):
            table = [header]
            for below in lines[at + 1 :]:
                row = _cells(below, is_markdown=is_markdown)
                if len(row) < len(HEADER):  # an empty line, or the line of signs below the table
                    break
                if not all(
                    set(cell) <= {"-", ":"} and len(cell) > 1 for cell in row
                ):  # Markdown's line below the header
                    table.append(row)
            return table
    return None


def _cells(line: str, *, is_markdown: bool) -> list[str]:
    cells = line.strip().strip("|").split("|") if is_markdown else next(csv.reader([line]), [])
    return [cell.strip() for cell in cells]


def _number(path: Path, name: str, cell: str) -> float:
    try:
        number = finite(float(cell.rstrip("%")))
    except ValueError:
        number = None
    if number is None:
        raise InputError(f"{path}: the value of {name} is '{cell}', not a number")
    return number


def _time_of(path: Path) -> str:
    match = TIME.search(path.name)
    return match[0] if match else ""
