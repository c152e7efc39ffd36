"""Report section on the changes that a calibration forecasts."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from sts_fast.forecast.blocks import CalibrationBlock, Scores
from sts_fast.outcomes.calibration.change_text import shown_change, shown_interval, unit_name
from sts_fast.report import figures
from sts_fast.report.numbers import counted, joined, percent
from sts_fast.report.ranking import FIRST_ROWS, MOST_ROWS
from sts_fast.statistics import Interval


@dataclass(frozen=True)
class ChangeRow:
    """One domain's change as a number and as text (`shown`).

    interval: None where the domain's score lies outside the scores that the calibration was fitted on
    """

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


def change_section(scores: Scores) -> ChangeSection | None:
    """The section; None for a run without a calibration, or with no change for any domain."""
    calibration = scores["calibration"]
    known = [(domain["change"], domain) for domain in scores["domains"] if domain["change"] is not None]
    if calibration is None or not known:
        return None
    unit, signed, level = calibration["unit"], calibration["signed"], f"{calibration['level']:.0%}"
    known.sort(key=lambda row: (-row[0], row[1]["name"]))
    rows = []
    for change, domain in known:
        bounds = domain["change_interval"]
        interval = None if bounds is None else (bounds[0], bounds[1])
        texts = shown_change(change, unit, signed=signed), shown_interval(interval, unit, signed=signed)
        rows.append(ChangeRow(domain["name"], change, interval, *(text.replace("-", "−") for text in texts)))
    shown = rows
    if len(rows) > MOST_ROWS:  # the largest changes, of both directions
        shown = sorted(sorted(rows, key=lambda row: -abs(row.change))[:FIRST_ROWS], key=lambda row: -row.change)
    figure = figures.dots(
        "changes",
        [
            figures.Dot(
                row.name,
                row.change,
                row.interval,
                f"{row.shown} {row.shown_interval}",
                kind="worse" if row.change < 0 else "",
            )
            for row in shown
        ],
        figures.Scale.over([0.0, *(v for row in shown for v in (row.change, *(row.interval or ())))]),
        axis=("← falls", unit_name(unit), "rises →") if signed else ("", "", f"{unit_name(unit)} →"),
        title=f"Forecast {'change' if signed else 'size of change'} of {counted(len(shown), 'domain')}",
        description=f"With {level} intervals. The table below the figure has all numbers.",
    )
    return ChangeSection(rows, signed, unit_name(unit), level, figure, _sentences(rows, calibration))


def _sentences(rows: list[ChangeRow], calibration: CalibrationBlock) -> list[str]:
    sentences = [
        f"Learned from {counted(calibration['n_runs'], 'past training')} on "
        f"{counted(calibration['n_trains'], 'training set')}: how scores by {calibration['estimator']} became changes. "
        "It holds for a training like those, with as many steps and the same rate and method."
    ]
    if calibration["coverage"] is not None:
        sentences.append(
            f"Tested on training sets left out of the learning, {percent(calibration['coverage'])} of the changes lay "
            f"inside their intervals, which were {calibration['width'] / calibration['constant_width']:.0%} as wide as "
            "intervals around the mean of past changes."
        )
    if calibration["signed"]:
        for word, names in (
            ("rise", [row.name for row in rows if row.interval and row.interval[0] > 0]),
            ("fall", [row.name for row in rows if row.interval and row.interval[1] < 0]),
        ):
            if names:
                sentences.append(f"The whole interval says that {joined(names)} will {word}.")
        if not any(row.interval and (row.interval[0] > 0 or row.interval[1] < 0) for row in rows):
            sentences.append("Every interval contains zero: no domain is sure to rise or fall.")
    else:
        sentences.append("These scores have no sign: only the size of a change is forecast, not its direction.")
    return sentences
