"""The page that compares several training sets, with links to their reports."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from sts_fast import files
from sts_fast.errors import InputError
from sts_fast.files import Document
from sts_fast.forecast.estimators import BY_NAME, IN_ORDER, Estimator
from sts_fast.forecast.run import COMPARISON_FILE, REPORT_FILE
from sts_fast.outcomes.calibration.change_text import shown_change, shown_interval, unit_name
from sts_fast.report.numbers import counted, percent, significant
from sts_fast.report.page import render
from sts_fast.report.signed import number_text

TEMPLATE = "comparison.html.j2"
N_SHADES = 3


@dataclass(frozen=True)
class Cell:
    """A domain's forecast for one training set.

    shade: its colour, such as 'better2', by its size relative to the largest in the grid
    """

    value: float
    text: str
    interval: str
    shade: str


@dataclass(frozen=True)
class Grid:
    """One estimator: domains down, training sets across; a cell is None where a domain has no answers."""

    id: str
    title: str
    meaning: str
    rows: list[tuple[str, list[Cell | None]]]
    level: str = "95%"


def build_comparison_report(folder: str | Path) -> Path:
    """Writes report.html beside the compare.json of several training sets, and returns its path.

    Raises InputError where compare.json cannot be read, or nothing can be written.
    """
    folder = Path(folder)
    path = folder / COMPARISON_FILE
    try:
        compared = json.loads(path.read_text(encoding="utf-8"))
        trains = [train["name"] for train in compared["trains"]]
        content = {
            "trains": [(name, f"{quote(name)}/{REPORT_FILE}") for name in trains],
            "domains": compared["domains"],
            "grids": [
                *_change_grids(compared, trains),
                *_score_grids(compared, trains),
            ],
            "shared": [
                (name, [percent(share) for share in row])
                for name, row in zip(trains, compared["shared_features"], strict=True)
            ],
            "sentence": f"{counted(len(trains), 'training set')} over {counted(len(compared['domains']), 'domain')}",
        }
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(f"{path} is not a readable {COMPARISON_FILE}: run sts-fast compare again") from error
    page = render(TEMPLATE, **content)
    with files.atomic_path(folder / REPORT_FILE) as written:
        written.write_text(page, encoding="utf-8", newline="\n")
    return folder / REPORT_FILE


def _change_grids(compared: Document, trains: list[str]) -> list[Grid]:
    """The grid of changes that a calibration forecasts; empty without a calibration."""
    changes = compared.get("changes")
    if changes is None:
        return []
    unit, signed = changes["unit"], changes["signed"]
    known = [abs(value) for name in trains for value in changes["trains"][name]["value"] if value is not None]
    largest = max(known, default=0.0) or 1.0
    rows = []
    for i, domain in enumerate(compared["domains"]):
        cells: list[Cell | None] = []
        for name in trains:
            value, interval = (changes["trains"][name][key][i] for key in ("value", "interval"))
            if value is None:
                cells.append(None)
                continue
            text = shown_change(value, unit, signed=signed).replace("-", "−")
            interval_text = shown_interval(interval, unit, signed=signed).replace("-", "−")
            shade = _shade(value, largest, "better" if value > 0 else "worse") if signed else _shade(value, largest)
            cells.append(Cell(value, text, interval_text, shade))
        rows.append((domain, cells))
    quantity = "change" if signed else "size of change"
    meaning = "learned from past trainings, and holds for trainings like them"
    return [Grid("changes", f"Forecast {quantity}, in {unit_name(unit)}", meaning, rows, f"{changes['level']:.0%}")]


def _shade(value: float, largest: float, kind: str = "size") -> str:
    size = min(N_SHADES, int((N_SHADES + 1) * abs(value) / largest))
    return f"{kind}{size}" if size else ""


def _score_grids(compared: Document, trains: list[str]) -> list[Grid]:
    return [_grid(compared, trains, BY_NAME[name]) for name in IN_ORDER if name in compared["scores"]]


def _grid(compared: Document, trains: list[str], estimator: Estimator) -> Grid:
    """The grid of one estimator; signed scores have a colour for each direction, sizes have one colour."""
    scores = compared["scores"][estimator.name]
    known = [abs(value) for name in trains for value in scores[name]["value"] if value is not None]
    largest = max(known, default=0.0) or 1.0

    def text(number: float) -> str:
        return number_text(estimator.name, estimator.factor * number) if estimator.signed else significant(number)

    rows = []
    for i, domain in enumerate(compared["domains"]):
        cells: list[Cell | None] = []
        for name in trains:
            value, ci = scores[name]["value"][i], scores[name]["ci"][i]
            if value is None:
                cells.append(None)
                continue
            kind = "size" if not estimator.signed else "better" if value > 0 else "worse"
            shade = _shade(value, largest, kind)
            cells.append(Cell(estimator.factor * value, text(value), f"{text(ci[0])} to {text(ci[1])}", shade))
        rows.append((domain, cells))
    title = estimator.title if estimator.signed else "size of the change, for better or worse"
    return Grid(estimator.name, f"{estimator.label}: {title}", estimator.meaning, rows)
