"""Inputs of a comparison: scores with their controls, and outcomes, as arrays."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sts_fast.errors import InputError, listed
from sts_fast.forecast.controls import CONTROLS
from sts_fast.forecast.estimators import BY_NAME, SIGNED
from sts_fast.forecast.run import Forecast, Run
from sts_fast.outcomes.outcomes import Outcome
from sts_fast.statistics import Z_95, Interval

if TYPE_CHECKING:
    from sts_fast.statistics import Doubles

Number = float | tuple[float, float, float]
# A forecast, the place of a run, its scores.json, or numbers by domain.
ScoreSource = Forecast | str | Path | Mapping[str, Any]
# A control's value by domain, as it was read.
ControlValues = dict[str, Any]

TEXT_CONTROLS = tuple(control.name for control in CONTROLS if control.of == "text")
MIN_DOMAINS = 4
# No score and no change is larger; squares of larger numbers would overflow.
LARGEST = 1e100


def read_scores(
    where: str, document: Mapping[str, Any], estimator: str
) -> tuple[dict[str, Number], dict[str, ControlValues]]:
    """Scores by domain; and control -> domain -> value. where: name of the document in messages."""
    if not isinstance(document.get("domains"), list):
        return {str(name): value for name, value in document.items()}, {}
    scores: dict[str, Number] = {}
    controls: dict[str, ControlValues] = {}
    # Controls have no signed numbers; a signed estimator is compared with their sizes.
    key = "act" if estimator in SIGNED else estimator
    for domain in document["domains"]:
        if not isinstance(domain, dict) or "name" not in domain:
            raise InputError(f"{where} is not a forecast, because a domain has no name: give a run of sts-fast score")
        score = domain.get("scores", {}).get(estimator)
        if score is None:
            continue
        if not isinstance(score.get("ci"), list) or len(score["ci"]) != 2:
            raise InputError(
                f"the interval of '{domain['name']}' in {where} is not a pair of numbers: make the run again"
            )
        scores[domain["name"]] = (score["value"], *score["ci"])
        for control, entry in (domain.get("controls") or {}).items():
            for label, number in _control_values(control, entry, key):
                controls.setdefault(label, {})[domain["name"]] = number
    if not scores:
        held = dict.fromkeys(name for domain in document["domains"] for name in domain.get("scores", {}))
        known = ", ".join(held) or "none"
        raise InputError(f"{where} has no scores by '{estimator}', only by {known}: name one of these")
    return scores, controls


def content_of(source: ScoreSource) -> tuple[str, Mapping[str, Any]]:
    """The source's name in messages, and its values."""
    if isinstance(source, Forecast):
        return "the forecast", source.to_dict()
    if isinstance(source, (str, Path)):
        return str(source), Run.load(source).scores
    return "the forecast", source


def _control_values(control: str, entry: Any, key: str) -> list[tuple[str, Any]]:
    """(label, value) of a control, which is a number, numbers by estimator (only `key` counts) or by other names."""
    if not isinstance(entry, dict):
        return [(control, entry)]
    others = [(f"{control} {name}", value) for name, value in entry.items() if name not in BY_NAME]
    return [*([(control, entry[key])] if key in entry else []), *others]


def unmatched(
    scores: Sequence[str], outcomes: Sequence[str], names: Mapping[str, str], said: Iterable[str]
) -> list[str]:
    """A warning about domains that only one side has. said: what was said when the outcomes were read."""
    if len(names) < MIN_DOMAINS:
        raise InputError(
            f"only {len(names)} domains are in both, and {MIN_DOMAINS} are needed: the forecast has "
            f"{listed(scores) or 'none'}; the outcomes have {listed(outcomes) or 'none'}; name those that belong "
            f"together with --match DOMAIN=TASK{''.join(f'; {text}' for text in said)}"
        )
    missing = [name for name in scores if name not in names]
    left = [name for name in outcomes if name not in names.values()]
    parts = [f"without an outcome: {listed(missing)}"] if missing else []
    parts += [f"without a score: {listed(left)}"] if left else []
    return ["left out, " + "; ".join(parts)] if parts else []


def score_arrays(scores: Mapping[str, Number], names: Mapping[str, Any]) -> tuple[Doubles, Doubles]:
    """Scores [n] and their standard deviations [n] by their 95% intervals, 0 where there is none."""
    values, deviations = np.zeros(len(names)), np.zeros(len(names))
    for i, name in enumerate(names):
        interval = interval_of(scores[name])
        values[i] = finite(f"the score of '{name}'", value_of(scores[name]))
        if interval is not None:
            low, high = (finite(f"the interval of '{name}'", bound) for bound in interval)
            if high < low:
                raise InputError(f"the interval of '{name}' ends before it begins")
            deviations[i] = (high - low) / (2 * Z_95)
    return values, deviations


def control_array(values: Mapping[str, Any], names: Iterable[str]) -> Doubles | None:
    """[n] a control's numbers; None where one of the domains has none."""
    numbers = [values.get(name) for name in names]
    if any(not isinstance(number, (int, float)) or not math.isfinite(number) for number in numbers):
        return None
    return np.asarray(numbers, np.float64)


def text_arrays(controls: Mapping[str, Mapping[str, Any]], names: Iterable[str]) -> dict[str, Doubles]:
    """The numbers [n] of each control that is made from the text of the questions alone."""
    names = list(names)
    of_text = {name: values for name, values in controls.items() if name.partition(" ")[0] in TEXT_CONTROLS}
    arrays = {name: control_array(values, names) for name, values in of_text.items()}
    return {name: numbers for name, numbers in arrays.items() if numbers is not None}


def value_of(number: Number) -> Any:
    return number[0] if isinstance(number, (tuple, list)) else number


def interval_of(number: Number) -> Interval | None:
    return (number[1], number[2]) if isinstance(number, (tuple, list)) and len(number) == 3 else None


def outcome_arrays(outcomes: Mapping[str, Outcome]) -> tuple[Doubles, Doubles]:
    """Changes [n] and their standard errors [n], NaN where unknown."""
    if len(outcomes) < MIN_DOMAINS:
        raise InputError(f"{MIN_DOMAINS} domains are needed, not {len(outcomes)}")
    for name, outcome in outcomes.items():
        finite(f"the change of '{name}'", outcome.change)
        if outcome.stderr is not None and finite(f"the standard error of '{name}'", outcome.stderr) < 0:
            raise InputError(f"the standard error of '{name}' is negative")
    change = np.asarray([outcome.change for outcome in outcomes.values()], np.float64)
    stderr = [math.nan if outcome.stderr is None else outcome.stderr for outcome in outcomes.values()]
    return change, np.asarray(stderr, np.float64)


def finite(what: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not math.fabs(value) < LARGEST:
        raise InputError(f"{what} is {value}, not a number")
    return float(value)
