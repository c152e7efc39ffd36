"""What the report says about the changes that a calibration forecasts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from sts_fast.outcomes.calibration.change_text import shown_change, shown_interval, unit_name
from sts_fast.report import figures
from sts_fast.report.numbers import counted, joined, percent
from sts_fast.report.ranking import FIRST_BARS, MOST_BARS
from sts_fast.statistics import Interval


@dataclass(frozen=True)
class ChangeRow:
    """One domain; interval is None where its score lies beyond those learned from. change, shown: number and text."""

    name: str
    change: float
    interval: Interval | None
    shown: str
    shown_interval: str


@dataclass(frozen=True)
class ChangeSection:
    """All domains with a change, the largest rise first."""

    rows: list[ChangeRow]
    signed: bool
    unit: str
    level: str
    figure: Markup
    sentences: list[str]


def change_section(scores: dict[str, Any]) -> ChangeSection | None:
    """None for a run without a calibration, or where it reached no domain."""
    said = scores["calibration"]
    known = [domain for domain in scores["domains"] if domain["change"] is not None]
    if said is None or not known:
        return None
    unit, signed, level = said["unit"], said["signed"], f"{said['level']:.0%}"
    known.sort(key=lambda domain: (-domain["change"], domain["name"]))
    rows = []
    for domain in known:
        interval = None if domain["change_interval"] is None else tuple(domain["change_interval"])
        texts = shown_change(domain["change"], unit, signed=signed), shown_interval(interval, unit, signed=signed)
        rows.append(ChangeRow(domain["name"], domain["change"], interval, *(text.replace("-", "−") for text in texts)))
    shown = rows
    if len(rows) > MOST_BARS:  # the largest changes, of both directions
        shown = sorted(sorted(rows, key=lambda row: -abs(row.change))[:FIRST_BARS], key=lambda row: -row.change)
    figure = figures.bars(
        "changes",
        [figures.Bar(row.name, row.change, row.interval, None, f"{row.shown} {row.shown_interval}") for row in shown],
        figures.Scale.over([0.0, *(v for row in shown for v in (row.change, *(row.interval or ())))]),
        title=f"Forecast {'change' if signed else 'size of change'} of {counted(len(shown), 'domain')}",
        description=f"With {level} intervals. The table below the figure has all numbers.",
    )
    return ChangeSection(rows, signed, unit_name(unit), level, figure, _sentences(rows, said))


def _sentences(rows: list[ChangeRow], said: dict[str, Any]) -> list[str]:
    sentences = [
        f"Learned from {counted(said['n_runs'], 'past training')} on {counted(said['n_trains'], 'training set')}, by "
        f"{said['estimator']}: how its scores became changes. It holds for a training like those: as many steps, the "
        "same rate and method."
    ]
    if said["coverage"] is not None:
        sentences.append(
            f"Tried on training sets left out of the learning, {percent(said['coverage'])} of the changes lay inside "
            f"their intervals, which were {said['width'] / said['constant_width']:.0%} as wide as intervals "
            "around the mean of past changes."
        )
    if said["signed"]:
        for word, names in (
            ("rise", [row.name for row in rows if row.interval and row.interval[0] > 0]),
            ("fall", [row.name for row in rows if row.interval and row.interval[1] < 0]),
        ):
            if names:
                sentences.append(f"The whole interval says that {joined(names)} will {word}.")
        if not any(row.interval and (row.interval[0] > 0 or row.interval[1] < 0) for row in rows):
            sentences.append("Every interval holds zero: no domain is sure to rise or fall.")
    else:
        sentences.append("These scores have no sign: only the size of a change is forecast, not its direction.")
    return sentences
