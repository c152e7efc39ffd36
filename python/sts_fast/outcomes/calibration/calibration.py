"""Learns from past trainings to forecast the change itself, in the outcome's own unit, with prediction intervals."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sts_fast import files
from sts_fast.errors import InputError, listed
from sts_fast.files import Document
from sts_fast.forecast.blocks import CalibrationBlock, LearnedBlock
from sts_fast.forecast.estimators import BY_NAME, SIGNED
from sts_fast.forecast.run import Forecast
from sts_fast.outcomes.calibration import past
from sts_fast.outcomes.calibration.change_text import shown_change, unit_name
from sts_fast.outcomes.calibration.conformal import (
    LEVEL,
    Assessment,
    Line,
    assess,
    fit_line,
    held_out_residuals,
    multiplier,
    trains_needed,
)
from sts_fast.statistics import Interval

CALIBRATION_FILE = "calibration.json"
CALIBRATION_SCHEMA_VERSION = "1.0"
# Characters of a line of text.
LINE = 79


@dataclass(frozen=True)
class Calibration:
    """Relation of one estimator's scores to changes, from past trainings of one model; see conformal for the equations.

    estimator:  estimator of the scores
    unit:       unit of the changes: 'accuracy' is a share of 1, 'given' is that of a table of changes
    level:      level of the intervals
    conditions: by name, what the scores depend on beside the training set: model, SAE, and options
    line:       change, and scale of its interval, as a function of the score
    multiplier: half width of the interval in units of the scale
    largest:    largest |score| learned from
    domains:    names of the domains learned from
    assessment: quality of the intervals on held-out training sets; None where too few would be left
    runs:       the past runs: number of the training set, its name, domains, hashes of the files
    warnings:   reservations about the calibration, one sentence each
    """

    estimator: str
    unit: str
    level: float
    conditions: past.Conditions
    line: Line
    multiplier: float
    largest: float
    domains: list[str]
    assessment: Assessment | None
    runs: list[past.LearnedRun]
    warnings: list[str]

    @property
    def signed(self) -> bool:
        """True if the direction of a change is forecast, not only its size."""
        return self.estimator in SIGNED

    @property
    def n_trains(self) -> int:
        """Number of different training sets among the past runs."""
        return len({run.train for run in self.runs})

    def change(self, score: float) -> float:
        """The change forecast for a score."""
        return float(self.line.change(np.asarray(score)))

    def interval(self, score: float) -> Interval | None:
        """Interval that contains the change with probability `level`; None for a score beyond all learned from."""
        if abs(score) > self.largest:
            return None
        half = self.multiplier * float(self.line.scale(np.asarray(score)))
        low, high = self.change(score) - half, self.change(score) + half
        return (low if self.signed else max(low, 0.0)), high

    def check(self, conditions: past.Conditions) -> None:
        """Raises InputError where given conditions of a forecast differ from those of the past runs."""
        learned = {name: value for name, value in self.conditions.items() if name in conditions}
        if differ := past.differences(learned, conditions):
            raise InputError(
                f"the calibration was learned from forecasts with other settings: {', '.join(differ)}; score with its "
                "settings, or learn a calibration from runs like this one"
            )

    def apply(self, forecast: Forecast) -> Forecast:
        """The forecast with `change` and `change_interval` of each domain that the estimator scores.

        A score beyond all learned from gets no interval, but a warning that gives the distance.

        Raises InputError where the forecast lacks the estimator, was made with another model, SAE or settings,
        or has most of its scores beyond those learned from.
        """
        document = forecast.to_dict()
        scores = past.forecasts_of(document, self.estimator)
        if not scores:
            option = BY_NAME[self.estimator].option
            raise InputError(f"the calibration was learned from '{self.estimator}': score with --estimators {option}")
        self.check(past.conditions(document, self.estimator))
        beyond = {name: abs(score) / self.largest for name, score in scores.items() if abs(score) > self.largest}
        if 2 * len(beyond) > len(scores):
            raise InputError(
                f"{len(beyond)} of {len(scores)} scores exceed the largest that the calibration was learned from "
                f"({self.largest:.3g}), in the median {np.median(list(beyond.values())):.1f} times as large: learn a "
                "calibration from runs like this one"
            )
        warnings = list(self.warnings)
        if beyond:
            shown = listed(f"{name} ({ratio:.2f} times)" for name, ratio in beyond.items())
            warnings.append(f"no interval for scores beyond the largest that the calibration was learned from: {shown}")
        if new := [name for name in scores if name not in self.domains]:
            warnings.append(
                f"the calibration was learned without {listed(new)}: their intervals are valid if they move like the "
                "others"
            )
        domains = [
            replace(
                domain,
                change=self.change(scores[domain.name]) if domain.name in scores else None,
                change_interval=self.interval(scores[domain.name]) if domain.name in scores else None,
            )
            for domain in forecast.domains
        ]
        return replace(forecast, domains=domains, calibration=self._block(warnings))

    def _block(self, warnings: list[str]) -> CalibrationBlock:
        learned: LearnedBlock = {
            "estimator": self.estimator,
            "unit": self.unit,
            "signed": self.signed,
            "level": self.level,
            "n_trains": self.n_trains,
            "n_runs": len(self.runs),
        }
        tested = self.assessment
        if tested is None:
            return {**learned, "coverage": None, "width": None, "constant_width": None, "warnings": warnings}
        return {
            **learned,
            "coverage": tested.coverage,
            "width": tested.width,
            "constant_width": tested.constant_width,
            "warnings": warnings,
        }

    def to_dict(self) -> Document:
        """The content of the file."""
        document: Document = json.loads(json.dumps(asdict(self), allow_nan=False))
        return {"schema_version": CALIBRATION_SCHEMA_VERSION, **document}

    def to_text(self) -> str:
        """The calibration as lines of text."""
        return text_of(self)

    def save(self, path: str | Path) -> None:
        """Writes it as JSON. Raises InputError where that fails."""
        document = self.to_dict()
        _validate(document)
        with files.atomic_path(path) as temporary:
            temporary.write_text(files.to_json(document), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """The calibration in a file. Raises InputError where `save` did not write it."""
        import jsonschema

        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_no_constant)
            _validate(document)
        except FileNotFoundError as error:
            raise InputError(f"there is no calibration {path}: make one with sts-fast validate --fit") from error
        except jsonschema.ValidationError as error:
            what = f"{error.json_path}: {error.message}"[:200]
            raise InputError(f"{path} is not a calibration: {what}; make one with sts-fast validate --fit") from error
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path} is not a calibration: {error}") from error
        del document["schema_version"]
        assessment = document.pop("assessment")
        if assessment is not None:
            assessment = Assessment(**{**assessment, "coverage_range": tuple(assessment["coverage_range"])})
        runs = [past.LearnedRun(**run) for run in document["runs"]]
        return cls(**{**document, "line": Line(**document["line"]), "assessment": assessment, "runs": runs})


def text_of(calibration: Calibration) -> str:
    """The relation that was learned, and the quality of its intervals on held-out training sets."""
    unit, line = calibration.unit, calibration.line

    def number(value: float) -> str:
        return shown_change(value, unit, signed=False)

    factor = 100 if unit == "accuracy" else 1
    what = "change" if calibration.signed else "size of change"
    start = f"{factor * line.intercept:.3g} + " if line.intercept else ""
    half = f"{factor * calibration.multiplier * line.floor:.3g}"
    if line.per_score:
        half += f" + {factor * calibration.multiplier * line.per_score:.3g} |score|"
    n_changes = sum(run.n_domains for run in calibration.runs)
    lines = [
        f"Learned from {len(calibration.runs)} runs on {calibration.n_trains} training sets: {n_changes} changes, "
        f"in {unit_name(unit)}",
        "",
        f"{what} = {start}{factor * line.slope:.3g} score    by '{calibration.estimator}', |score| up to "
        f"{calibration.largest:.3g}",
        f"{calibration.level:.0%} interval: that ± ({half})",
    ]
    if (assessment := calibration.assessment) is not None:
        lines += [
            "",
            f"{'Training sets held out in turn':<32}{'inside':>8}{'mean width':>13}{'interval score':>17}{'error':>8}",
            f"{'by the score':<32}{assessment.coverage:>8.0%}{number(assessment.width):>13}"
            f"{number(assessment.interval_score):>17}{number(assessment.error):>8}",
            f"{'the mean change, always':<32}{assessment.constant_coverage:>8.0%}"
            f"{number(assessment.constant_width):>13}{number(assessment.constant_interval_score):>17}"
            f"{number(assessment.constant_error):>8}",
            "",
            *textwrap.wrap(
                f"In single training sets {assessment.coverage_range[0]:.0%} to "
                f"{assessment.coverage_range[1]:.0%} of the changes lie inside. The interval score is the "
                f"width, and {2 / (1 - calibration.level):.0f} times how far outside a change lies: smaller is better.",
                LINE,
            ),
        ]
    return "\n".join(lines)


def fit_calibration(runs: str | Path | Iterable[str | Path], *, estimator: str | None = None) -> Calibration:
    """Learns the relation of scores to changes from past runs.

    runs:      folders that sts-fast score or compare wrote, or folders of them, each with the outcome that
               sts-fast validate put beside it; runs without one are left out
    estimator: by default the first of trial, adapter, step, ntk, act, icl, act_sq that all runs have

    Raises InputError where fewer than nine different training sets have an outcome, which an interval of 90% needs, or
    where runs differ in model, SAE, settings or kind of outcome.
    """
    having, without = past.read_past([runs] if isinstance(runs, (str, Path)) else runs)
    unit = past.unit_of(having)
    estimator = past.choose_estimator(having, estimator)
    conditions = past.check_alike(having, estimator)
    points, keys = past.points_of(having, estimator)
    if len(keys) < trains_needed():
        raise InputError(
            f"an interval of {LEVEL:.0%} needs past runs on {trains_needed()} different training sets, but only "
            f"{len(keys)} have an outcome: validate more runs"
        )
    if not np.ptp(points.score):
        raise InputError(f"all scores by '{estimator}' in the past runs are the same: nothing can be learned from them")
    assessment, line = assess(points), fit_line(points)
    return Calibration(
        estimator=estimator,
        unit=unit,
        level=LEVEL,
        conditions=conditions,
        line=line,
        multiplier=multiplier(held_out_residuals(points), points.train),
        largest=float(np.abs(points.score).max()),
        domains=sorted({name for run in having for name in run.outcomes}),
        assessment=assessment,
        runs=[past.described(run, keys.index(past.train_key(run.scores))) for run in having],
        warnings=_warnings(having, without, line, assessment),
    )


def _warnings(having: list[past.PastRun], without: list[Path], line: Line, assessment: Assessment | None) -> list[str]:
    warnings = []
    if without:
        warnings.append(f"left out, without an outcome: {listed(map(str, without))}")
    if unlike := [run for run in having if run.mismatches]:
        warnings.append(
            f"the evaluations before and after do not match in {listed((run.folder for run in unlike), 4)}, such as: "
            f"{unlike[0].mismatches[0]}; sts-fast validate says more of each"
        )
    largest = [max(abs(outcome.change) for outcome in run.outcomes.values()) for run in having]
    if min(largest) <= 1 < max(largest):
        percent, share = (having[largest.index(pick(largest))].folder for pick in (max, min))
        warnings.append(f"changes exceed 1 in {percent} but not in {share}: percent in one, shares in the other?")
    if assessment is None:
        warnings.append(
            f"the intervals could not be tested: that needs {trains_needed() + 1} training sets, one held out"
        )
    elif assessment.interval_score >= assessment.constant_interval_score:
        warnings.append("on held-out training sets the scores did no better than the mean change of past trainings")
    if line.slope < 0:
        warnings.append("past changes had the opposite sign of the scores, so the forecast inverts it")
    return warnings


def _no_constant(name: str) -> None:
    raise ValueError(f"it contains {name}")


def _validate(document: Any) -> None:
    files.check_document(document, files.load_schema("outcomes/calibration/calibration.schema.json"))
