"""Tables of accuracies: CSV and TSV."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from pathlib import Path

from sts_fast.errors import InputError
from sts_fast.outcomes.evaluation import Evaluation, Result, Task, finite, read_text

NAME_COLUMNS = ("domain", "task", "category", "subject", "name")
ACCURACY_COLUMNS = ("accuracy", "acc", "value")
DECIMAL_COMMA = re.compile(r"[+-]?\d*,\d+%?")
# A table with a number up to 1 and one above this has shares beside percentages.
SURELY_PERCENT = 5.0


def recognises(path: Path) -> bool:
    return path.suffix.lower() in (".csv", ".tsv")


def read_table(path: Path) -> list[tuple[int, str, dict[str, float]]]:
    """(line, domain, numbers by column) of a CSV or TSV with a header; empty cells are left out, 31% is .31."""
    lines = read_text(path).splitlines()
    header_line = lines[0] if lines else ""
    separators = "\t" if path.suffix.lower() == ".tsv" else ",;\t"
    reader = csv.reader(lines, delimiter=max(separators, key=header_line.count))
    try:
        cells = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(map(str.strip, row))]
    except csv.Error as error:
        raise InputError(f"{path} is not a readable table: {error}") from error
    header = [cell.lower() for cell in cells[0][1]] if cells else []
    column = next((header.index(name) for name in NAME_COLUMNS if name in header), None)
    if column is None:
        raise InputError(
            f"{path} has no column 'domain' in its first line: name the columns domain,accuracy[,stderr][,n]"
        )
    table: list[tuple[int, str, dict[str, float]]] = []
    known = {"before", "after", "change", "stderr", "n", *ACCURACY_COLUMNS}
    for line, row in cells[1:]:
        numbers = {}
        for name, cell in zip(header, row, strict=False):
            if name in known and cell:
                numbers[name] = _cell(path, line, name, cell)
        if len(row) <= column or not row[column]:
            raise InputError(f"{path}, line {line} has no domain: fill it in")
        if any(row[column] == other for _, other, _ in table):
            raise InputError(f"{path}, line {line}: the domain '{row[column]}' occurs twice")
        if numbers.get("stderr", 0.0) < 0:
            raise InputError(f"{path}, line {line}: the standard error is negative")
        table.append((line, row[column], numbers))
    if not table:
        raise InputError(f"{path} has no rows")
    return table


def _cell(path: Path, line: int, name: str, cell: str) -> float:
    percent = cell.endswith("%") and name != "n"
    try:
        number = finite(float(cell[:-1]) / 100 if percent else float(cell))
    except ValueError:
        number = None
    if number is None:
        hint = f": write {cell.replace(',', '.')}" if DECIMAL_COMMA.fullmatch(cell) else ""
        raise InputError(f"{path}, line {line}: {name} is '{cell}', not a number{hint}")
    return number


def read(path: Path) -> Evaluation:
    """One column of one scale: shares of 1 or, where all numbers are above 1, percentages.

    Raises InputError for a column that has both.
    """
    table = read_table(path)
    values = {}
    for line, name, numbers in table:
        value = next((numbers[column] for column in ACCURACY_COLUMNS if column in numbers), None)
        if value is None:
            raise InputError(f"{path}, line {line}: '{name}' has no accuracy; columns: domain,accuracy[,stderr][,n]")
        values[name] = value
    check_scale(path, values)
    percent = max(values.values()) > 1
    is_accuracy = any(column in numbers for _, _, numbers in table for column in ACCURACY_COLUMNS if column != "value")
    # A column 'value' says what it is only by its numbers.
    metric = "accuracy" if is_accuracy or not percent else "value"
    evaluation = Evaluation()
    for _, name, numbers in table:
        n = numbers.get("n")
        result = Result(
            values[name], metric, numbers.get("stderr"), None if n is None else int(n),
            percent=percent if metric == "accuracy" else None,
        )  # fmt: skip
        evaluation.tasks[name] = Task({metric: result}, made={} if n is None else {"number of questions": str(int(n))})
    return evaluation


def check_scale(path: Path, values: Mapping[str, float]) -> None:
    """Raises InputError where some numbers are shares of 1 and others percentages."""
    shares = [name for name, value in values.items() if 0 < value <= 1]
    percentages = [name for name, value in values.items() if value > SURELY_PERCENT]
    if shares and percentages:
        share, percentage = shares[0], percentages[0]
        raise InputError(
            f"{path} has shares of 1 ({share}: {values[share]:g}) beside percentages ({percentage}: "
            f"{values[percentage]:g}): write all alike, or percentages with the sign %"
        )
