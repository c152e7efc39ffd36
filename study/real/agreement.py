"""Correlation of each forecast with the changes that the light trainings made, on the design part alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from study.real import runs
from study.real.changes import Training, ceiling

# Every number is set against the fall of the loss, and against the size of its change.
KINDS = ("signed", "size")


@dataclass(frozen=True)
class Agreement:
    """One number of one forecast: Pearson's r over domains, by training."""

    forecast: str
    number: str
    r: dict[str, list[float]]


def agreements(trainings: list[Training]) -> list[Agreement]:
    """Of every number that a forecast has of all design training sets and domains, best first by |mean r|.

    Domains of the training set's own kind do not count, and trainings below the least reliability neither.
    """
    chosen = counted(trainings)
    found = []
    for path in sorted((runs.RESULTS / "forecasts").glob("*.json")):
        record = runs.read_json(path)
        for layer in (key for key in record if key.isdecimal()):
            of_trains = record[layer]
            numbers = next(iter(next(iter(of_trains.values())).values()))
            for number in numbers:
                r = {kind: [of_training(t, of_trains, number, kind) for t in chosen] for kind in KINDS}
                if chosen and not np.isnan([*r["signed"], *r["size"]]).any():
                    found.append(Agreement(f"{path.stem}, layer {layer}", number, r))
    return sorted(found, key=lambda a: -max(abs(np.mean(values)) for values in a.r.values()))


def counted(trainings: list[Training]) -> list[Training]:
    """The light trainings on design sets, first seed, whose outcomes are reliable."""
    trains = runs.read_json(runs.RESULTS / "split.json")["design"]["trains"]
    light = [t for t in trainings if t.record["way"] == "light" and t.record["seed"] == 0]
    return [t for t in light if t.counts and t.record["train"] in trains]


def of_training(training: Training, of_trains: dict[str, Any], number: str, kind: str) -> float:
    """r over the domains that are not the training set's own; NaN where the number is missing or constant."""
    forecasts = of_trains.get(training.record["train"], {})
    domains = [domain for domain in training.others if number in forecasts.get(domain, {})]
    if len(domains) < 3 or len(domains) < len([domain for domain in training.others if domain in forecasts]):
        return float("nan")
    values = np.asarray([forecasts[domain][number] for domain in domains])
    falls = np.asarray([-training.changes["loss"][domain].mean for domain in domains])
    if np.ptp(values) == 0:
        return float("nan")
    return float(np.corrcoef(values, falls if kind == "signed" else np.abs(falls))[0, 1])


def ceilings(trainings: list[Training]) -> dict[str, list[float]]:
    """Largest r that reliability allows, by kind, for each training that `agreements` counts."""
    return {kind: [ceiling(t.reliability(size=kind == "size")) for t in counted(trainings)] for kind in KINDS}


def costs(trainings: list[Training]) -> list[tuple[str, float, float, int]]:
    """Forecast, its processor seconds, their share of those of training on the same sets (at both rates) and evaluating
    the same domains, its peak memory in MB."""
    part = runs.read_json(runs.RESULTS / "split.json")["design"]
    records = [t.record for t in trainings if t.record["way"] == "light" and t.record["seed"] == 0]
    spent = sum(
        record["all_rates_seconds"] + record["measure_seconds"] * len(part["domains"]) / len(record["domains"])
        for record in records
        if record["train"] in part["trains"]
    )
    made = []
    for path in sorted((runs.RESULTS / "forecasts").glob("*.json")):
        record = runs.read_json(path)
        made.append((path.stem, record["seconds"], record["seconds"] / spent if spent else 0.0, record["peak_mb"]))
    return made
