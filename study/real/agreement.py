"""How each number of each forecast agrees with the changes that trainings made, on one part of the split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sts_fast.forecast.estimators import SIGNED
from sts_fast.outcomes.validate.statistics import sign_auc
from sts_fast.statistics import partial_pearson, pearson
from study.real import runs
from study.real.changes import Training, ceiling

Doubles = NDArray[np.float64]

# Every number is set against the fall of the loss, and against the size of its change.
KINDS = ("signed", "size")
LEAST_DOMAINS = 3  # for a correlation


@dataclass(frozen=True)
class Number:
    """One number of one forecast: training set -> domain -> value.

    is_signed: whether its distance from zero forecasts the size of a change
    """

    forecast: str
    layer: str
    name: str
    values: dict[str, dict[str, float]]
    is_signed: bool = False

    @property
    def key(self) -> list[str]:
        return [self.forecast, self.layer, self.name]


@dataclass(frozen=True)
class Agreement:
    """A number's agreement with the outcomes, by training; NaN where it cannot be told.

    r:       by kind, Pearson's r over domains; given: the same, with a text-only control partialled out
    auc:     share of the pairs of a clear fall and a clear rise that the number puts in the right order
    """

    number: Number
    r: dict[str, Doubles]
    given: dict[str, Doubles]
    auc: Doubles


def numbers_of(part: str) -> list[Number]:
    """Every number of every forecast that has been made of a part."""
    found = []
    for path in sorted((runs.RESULTS / "forecasts" / part).glob("*.json")):
        record = runs.read_json(path)
        for layer in (key for key in record if key.isdecimal()):
            first = next(iter(next(iter(record[layer].values())).values()))
            for name in first:
                if name.startswith("text_") and any(number.name == name for number in found):
                    continue  # the same for all
                values = {
                    train: {domain: of[name] for domain, of in domains.items() if name in of}
                    for train, domains in record[layer].items()
                }
                is_signed = name in (*SIGNED, "gradient_cosine", "trial mean_fall")
                found.append(Number(path.stem, layer, name, values, is_signed))
    return found


def counted(trainings: Sequence[Training], part: str, way: str = "light") -> list[Training]:
    """The trainings of a way on a part's sets, first seed, whose outcomes are reliable."""
    trains = runs.read_json(runs.RESULTS / "split.json")[part]["trains"]
    some = [t for t in trainings if t.record["way"] == way and t.record["seed"] == 0]
    return [t for t in some if t.counts and t.record["train"] in trains]


def agreement(number: Number, trainings: Sequence[Training], control: Number | None = None) -> Agreement:
    """Domains of a training set's own kind do not count."""
    r: dict[str, list[float]] = {kind: [] for kind in KINDS}
    given: dict[str, list[float]] = {kind: [] for kind in KINDS}
    auc = []
    for training in trainings:
        of_train = number.values.get(training.record["train"], {})
        domains = [domain for domain in training.others if domain in of_train]
        value = np.asarray([of_train[domain] for domain in domains])
        changes = [training.changes["loss"][domain] for domain in domains]
        fall = np.asarray([-change.mean for change in changes])
        text = None
        if control is not None:
            text = np.asarray([control.values[training.record["train"]][domain] for domain in domains])
        size = np.abs(value) if number.is_signed else value
        for kind, foretold, outcome in (("signed", value, fall), ("size", size, np.abs(fall))):
            r[kind].append(correlation(foretold, outcome))
            given[kind].append(np.nan if text is None else float(partial_pearson(foretold, outcome, text)))
        clear = np.asarray([change.is_clear for change in changes], bool)
        found = sign_auc(value[clear], fall[clear])
        auc.append(np.nan if found is None else found)
    return Agreement(
        number,
        {kind: np.asarray(values) for kind, values in r.items()},
        {kind: np.asarray(values) for kind, values in given.items()},
        np.asarray(auc),
    )


def correlation(one: Doubles, other: Doubles) -> float:
    """Pearson's r; NaN for too few or constant values."""
    return float(pearson(one, other)) if len(one) >= LEAST_DOMAINS else float("nan")


def ceilings(trainings: Sequence[Training], kind: str) -> Doubles:
    """[n_trainings] the largest r that the reliability of each outcome allows."""
    return np.asarray([ceiling(t.reliability(size=kind == "size")) for t in trainings])


def costs(trainings: Sequence[Training], part: str) -> dict[str, tuple[float, float, int]]:
    """By forecast, its processor seconds, their share of those of training on the same sets (at both rates) and
    evaluating the same domains, and its peak memory in MB."""
    sets = runs.read_json(runs.RESULTS / "split.json")[part]
    spent = sum(_spent(t.record, sets) for t in trainings)
    made = {}
    for path in sorted((runs.RESULTS / "forecasts" / part).glob("*.json")):
        record = runs.read_json(path)
        made[path.stem] = record["seconds"], record["seconds"] / spent if spent else 0.0, record["peak_mb"]
    return made


def _spent(record: dict[str, Any], part: dict[str, list[str]]) -> float:
    """Seconds of training on a set and evaluating the part's domains, as the share of all that were evaluated."""
    seconds: float = record["all_rates_seconds"]
    return seconds + record["measure_seconds"] * len(part["domains"]) / len(record["domains"])


def frozen() -> dict[str, Any] | None:
    """What is judged: 'forecasts', 'numbers' as [forecast, layer, name] and 'control', the same; None before that."""
    path: Path = runs.RESULTS / "frozen.json"
    return runs.read_json(path) if path.exists() else None
