"""Report section on the measurements of TransferMonitor during training, beside the forecast."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from sts_fast.report import figures
from sts_fast.report.numbers import count, counted, isolated, joined, percent, significant
from sts_fast.report.ranking import value_of

# More lines than these cannot be distinguished.
MOST_LINES = 6


@dataclass(frozen=True)
class Exposed:
    """A domain's exposure at the end, the forecast's score by icl in the same unit, and its budget."""

    name: str
    exposure: float
    forecast: float | None
    budget: float | None


@dataclass(frozen=True)
class TrainingSection:
    """Figures show overlap and share over steps, and exposures; None with a single measurement."""

    sentences: list[str]
    overlap_figure: Markup | None
    exposure_figure: Markup | None
    rows: list[Exposed]


def training_section(training: dict[str, Any], scores: dict[str, Any]) -> TrainingSection | None:
    """The section; None where the file contains no measurement of this forecast."""
    history = [measurement for measurement in training.get("history") or [] if _is_measurement(measurement)]
    if not history:
        return None
    steps = [measurement["step"] for measurement in history]
    first, last = history[0], history[-1]
    forecasts = {domain["name"]: value_of(domain, "icl") for domain in scores["domains"]}
    budgets = training.get("stop_when") or {}
    rows = sorted(
        (
            Exposed(name, exposure, forecasts.get(name), budgets.get(name))
            for name, exposure in last["exposure"].items()
        ),
        key=lambda row: (-row.exposure, row.name),
    )
    top_n = scores["settings"]["top_n"]
    sentences = [
        f"Measured {counted(len(history), 'time')}, from step {count(first['step'])} to {count(last['step'])}. "
        f"Of the {count(top_n)} features that training has moved most, {percent(last['overlap'])} are in the "
        f"forecast's D_N, which has {percent(last['share_of_top_n'])} of the whole shift on the training set."
    ]
    passed = [row.name for row in rows if row.forecast and row.exposure > row.forecast]
    if passed:
        sentences.append(f"Training moved {joined(passed)} further than the domain's own demonstrations do (STS_icl).")
    over = [row.name for row in rows if row.budget is not None and row.exposure > row.budget]
    if over:
        sentences.append(f"Training was stopped: the exposure of {joined(over)} passed its budget.")
    shown = [row.name for row in rows[:MOST_LINES]]
    return TrainingSection(
        sentences,
        _overlap(steps, history),
        _exposures(steps, history, shown, len(rows)),
        rows,
    )


def _overlap(steps: Sequence[int], history: Sequence[dict[str, Any]]) -> Markup | None:
    if len(steps) < 2:
        return None
    series = {
        "overlap": [100 * measurement["overlap"] for measurement in history],
        "share in D_N": [100 * measurement["share_of_top_n"] for measurement in history],
    }
    ends = "; ".join(f"{name} ends at {values[-1]:.0f}%" for name, values in series.items())
    return figures.lines(
        "training-overlap",
        steps,
        series,
        x_label="step →",
        y_label="↑ percent",
        title="Overlap of the features that training moves with those forecast",
        description=f"Over {count(steps[-1])} steps: {ends}.",
    )


def _exposures(
    steps: Sequence[int], history: Sequence[dict[str, Any]], shown: Sequence[str], n_domains: int
) -> Markup | None:
    if len(steps) < 2 or not shown:
        return None
    # Before training nothing has moved.
    series = {name: [0.0, *(measurement["exposure"].get(name, 0.0) for measurement in history)] for name in shown}
    ends = "; ".join(f"{isolated(name)} ends at {significant(values[-1])}" for name, values in series.items())
    return figures.lines(
        "training-exposure",
        [0, *steps],
        series,
        x_label="step →",
        y_label="↑ exposure",
        title=f"Exposure of {'the most exposed of ' if n_domains > len(shown) else ''}the domains",
        description=f"Over {count(steps[-1])} steps: {ends}.",
    )


def _is_measurement(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("exposure"), dict):
        return False
    numbers = [entry.get(name) for name in ("step", "overlap", "share_of_top_n")] + list(entry["exposure"].values())
    return all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers)
