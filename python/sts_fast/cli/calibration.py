"""Calibrations on the command line: reads one before a forecast, applies it afterwards, prints the changes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

from rich.markup import escape

from sts_fast import files
from sts_fast.cli.console import SIDE_WIDTH, Table, err, out
from sts_fast.errors import InputError
from sts_fast.files import Document
from sts_fast.forecast.estimators import BY_NAME
from sts_fast.forecast.options import Settings
from sts_fast.forecast.run import Forecast
from sts_fast.outcomes.calibration import Calibration
from sts_fast.outcomes.calibration.change_text import shown_change, shown_interval, unit_name

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


def print_changes(forecast: Forecast) -> None:
    """The change of each domain, the largest rise first."""
    calibration = forecast.calibration
    if calibration is None:
        return
    unit, signed = calibration["unit"], calibration["signed"]
    what = "Forecast change" if signed else "Forecast size of change (its direction is not known)"
    table = Table(title=f"{what}, in {unit_name(unit)}", title_justify="left", width=79)
    table.add_column("domain", ratio=1)
    for column in ("worse", "better") if signed else ("",):
        table.add_column(column, width=SIDE_WIDTH, justify="right" if column == "worse" else "left")
    table.add_column("change", justify="right", no_wrap=True)
    table.add_column(f"[{calibration['level']:.0%}]", justify="right", no_wrap=True)
    known = [(domain.change, domain) for domain in forecast.domains if domain.change is not None]
    largest = max(abs(change) for change, _ in known) or 1.0
    for change, domain in sorted(known, key=lambda row: -row[0]):
        bar = "█" * round(SIDE_WIDTH * abs(change) / largest)
        bars = ((bar, "") if change < 0 else ("", bar)) if signed else (bar,)
        cells = shown_change(change, unit, signed=signed), shown_interval(domain.change_interval, unit, signed=signed)
        table.add_row(escape(domain.name), *bars, cells[0], escape(cells[1]))
    out.print(table)
    learned = (
        f"Learned from {calibration['n_runs']} trainings on {calibration['n_trains']} sets, by "
        f"'{calibration['estimator']}': valid for a training like those."
    )
    if calibration["coverage"] is not None:
        ratio = calibration["width"] / calibration["constant_width"]
        learned += (
            f"\nOn held-out sets {calibration['coverage']:.0%} of the changes lay inside the intervals, which "
            f"were {ratio:.0%} as wide as those around the mean change."
        )
    out.print(learned, highlight=False, markup=False)


def print_change_comparison(comparison: Document) -> None:
    """The change of each domain by training set."""
    changes = comparison["changes"]
    if changes is None:
        return
    unit, signed = changes["unit"], changes["signed"]
    what = "change" if signed else "size of change (its direction is not known)"
    table = Table(title=f"Forecast {what}, in {unit_name(unit)} [{changes['level']:.0%}]", title_justify="left")
    table.add_column("domain")
    for name in changes["trains"]:
        table.add_column(escape(name), justify="right")
    for i, domain in enumerate(comparison["domains"]):
        cells = []
        for of_train in changes["trains"].values():
            change, interval = of_train["value"][i], of_train["interval"][i]
            text = "" if change is None else f"{shown_change(change, unit, signed=signed)} "
            cells.append(escape(text + ("" if change is None else shown_interval(interval, unit, signed=signed))))
        table.add_row(escape(domain), *cells)
    out.print(table)


def print_warnings(forecasts: list[Forecast]) -> None:
    warnings = [forecast.calibration["warnings"] for forecast in forecasts if forecast.calibration is not None]
    for warning in dict.fromkeys(itertools.chain(*warnings)):
        err.print(f"warning: {warning}", style="yellow", highlight=False, markup=False, soft_wrap=True)
