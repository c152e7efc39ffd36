"""Calibrations on the command line: reads one before a forecast, applies it afterwards, shows the changes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sts_fast import files
from sts_fast.cli.console import say
from sts_fast.cli.domain_table import Column, Number
from sts_fast.errors import InputError
from sts_fast.files import Document
from sts_fast.forecast.estimators import BY_NAME, label_of
from sts_fast.forecast.options import Settings
from sts_fast.forecast.run import Forecast
from sts_fast.outcomes.calibration import Calibration
from sts_fast.outcomes.calibration.change_text import shown_change, shown_interval, unit_name
from sts_fast.statistics import Interval

OPTIONS = ("dims", "top_n", "tokens", "shots", "domain_shots", "demo_draws", "signed_features")


def read_calibration(path: Path, settings: Settings, n_saes: int) -> Calibration:
    """The calibration in a file. Raises InputError where it does not fit a forecast with these settings."""
    calibration = Calibration.load(path)
    if n_saes > 1:
        raise InputError("a calibration belongs to one SAE: give --calibration with one --sae")
    estimator = BY_NAME[calibration.estimator].option
    if estimator not in settings.estimators:
        raise InputError(f"{path} was learned from '{calibration.estimator}': add {estimator} to --estimators")
    calibration.check({f"--{name.replace('_', '-')}": getattr(settings, name) for name in OPTIONS})
    return calibration


def calibrated(forecast: Forecast, calibration: Calibration, path: Path) -> Forecast:
    """The forecast with its changes, and with the calibration's file in its provenance."""
    inputs = [*forecast.provenance["inputs"], *files.hashed_inputs("calibration", [path])]
    return calibration.apply(replace(forecast, provenance={**forecast.provenance, "inputs": inputs}))


def change_title(forecast: Forecast) -> str:
    """Of the table whose first column is the change."""
    calibration = forecast.calibration
    return "" if calibration is None else _title(calibration["unit"], signed=calibration["signed"])


def change_bars(forecast: Forecast) -> str:
    """The bars of that column; see print_domains."""
    return "both" if forecast.calibration is not None and forecast.calibration["signed"] else "one"


def change_column(forecast: Forecast) -> Column | None:
    """The change of each domain that has one; None without a calibration."""
    calibration = forecast.calibration
    if calibration is None:
        return None
    known = {domain.name: (domain.change, domain.change_interval) for domain in forecast.domains}
    return _column("change", known, calibration)


def learned(forecast: Forecast) -> list[str]:
    """Sentences that say which runs the changes were learned from, and how good they were."""
    calibration = forecast.calibration
    if calibration is None:
        return []
    lines = [
        f"The change is learned from {calibration['n_runs']} trainings on {calibration['n_trains']} sets, by "
        f"{label_of(calibration['estimator'])}: valid for a training like those."
    ]
    if calibration["coverage"] is not None:
        ratio = calibration["width"] / calibration["constant_width"]
        lines.append(
            f"On held-out sets {calibration['coverage']:.0%} of the changes lay inside the intervals, which were "
            f"{ratio:.0%} as wide as those around the mean change."
        )
    return lines


def changes_title(comparison: Document) -> str:
    """The same of a comparison."""
    return _title(comparison["changes"]["unit"], signed=comparison["changes"]["signed"])


def change_columns(comparison: Document) -> list[Column]:
    """The change of each domain by training set; none without a calibration."""
    changes, domains = comparison["changes"], comparison["domains"]
    if changes is None:
        return []
    columns = []
    for train, of_train in changes["trains"].items():
        rows = zip(of_train["value"], of_train["interval"], strict=True)
        columns.append(_column(f"change\n{train}", dict(zip(domains, rows, strict=True)), changes))
    return columns


def _title(unit: str, *, signed: bool) -> str:
    what = "change" if signed else "size of change (its direction is not known)"
    return f"Forecast {what}, in {unit_name(unit)}"


def _column(heading: str, known: Mapping[str, tuple[float | None, Interval | None]], how: Any) -> Column:
    """how: a calibration, or the changes of a comparison"""
    unit, signed, numbers = how["unit"], how["signed"], {}
    for name, (change, interval) in known.items():
        if change is not None:
            short = shown_change(change, unit, signed=signed)
            numbers[name] = Number(change, short, f"{short} {shown_interval(interval, unit, signed=signed)}")
    return Column(heading, f" [{how['level']:.0%}]", numbers)


def print_warnings(forecasts: list[Forecast]) -> None:
    warnings = [forecast.calibration["warnings"] for forecast in forecasts if forecast.calibration is not None]
    for warning in dict.fromkeys(itertools.chain(*warnings)):
        say(f"warning: {warning}")
