"""Intervals of the change itself, learned from past trainings: how often they hold, and how wide they are.

python -m benchmarks.study calibrate     # of every base model that `run` has left in build/study
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study.trials import DOMAINS, TRAINS
from sts_fast.calibration.conformal import Points, fit_constant, fit_line, judge

RESULTS = Path(__file__).parents[1] / "results" / "calibration.json"
TABLES = RESULTS.with_suffix(".md")
# Base models that the way of calibrating was chosen on, and those that judge it.
DESIGNED_ON, JUDGED_ON = "package", ("base-3", "base-4", "base-5")
# Predictor: how it is called in the raw results for changes of P or accuracy, and of the loss; whether it has a sign.
PREDICTORS = {
    "adapter (sae)": ("adapter (sae)", "adapter_loss (sae)", True),
    "adapter (raw)": ("adapter (raw)", "adapter_loss (raw)", True),
    "ntk (sae)": ("ntk (sae)", "ntk_loss (sae)", True),
    "gradients of all parameters": ("parameters", "parameters_loss", True),
    "STS_act": ("STS_act", "STS_act", False),
    "STS_icl": ("STS_icl", "STS_icl", False),
    "most active features": ("most active features", "most active features", False),
    "cosine of means": ("cosine of means", "cosine of means", False),
}
OUTCOMES = {"dP": "change of P(answer)", "daccuracy": "change of accuracy", "dloss": "fall of the loss"}
FIGURES = ("coverage", "width", "interval_score", "error")


@dataclass(frozen=True)
class Trial:
    """What one calibration is learned from, and the points of one training set that it is held against."""

    past: Points
    new: Points


def calibrate(work: Path) -> dict[str, Any]:
    """By question and way of training: outcome -> predictor -> figures, each a list over held-out training sets."""
    raw = {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for base in (DESIGNED_ON, *JUDGED_ON)
        if (path := work / f"{base}.json").is_file()
    }
    if not raw:
        raise SystemExit(f"{work} holds no results: python -m benchmarks.study run package first")
    found: dict[str, Any] = {}
    for base, regime, outcome, name in cases(raw):
        points = {one: points_of(raw[one], regime, name, outcome) for one in raw if regime in raw[one]["trials"]}
        questions = {
            f"{base}, {regime}": held_out_sets(points[base]),
            f"{base} from the other models, {regime}": held_out_models(points, base),
        }
        if regime != "light":
            light = points_of(raw[base], "light", name, outcome)
            questions[f"{base}, {regime} from light"] = other_regime(light, points[base])
        else:
            questions[f"{base}, {regime}, new skills"] = new_skills(points[base])
        for question, trials in questions.items():
            of_question = found.setdefault(question, {}).setdefault(outcome, {})
            if figures := figures_of(trials):
                of_question[name] = figures
    RESULTS.write_text(json.dumps(found, separators=(",", ":")) + "\n", encoding="utf-8")
    TABLES.write_text(tables(found), encoding="utf-8")
    return found


def cases(raw: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    for base, of_base in raw.items():
        for regime in of_base["trials"]:
            for outcome in OUTCOMES:
                for name in PREDICTORS:
                    yield base, regime, outcome, name


@dataclass(frozen=True)
class Study:
    """Points with the number of the domain of each, [n]."""

    points: Points
    domain: Any


def points_of(of_base: dict[str, Any], regime: str, name: str, outcome: str) -> Study:
    """All trainings of one base model: the zero-shot change in every domain but the one trained on."""
    of_change, of_loss, signed = PREDICTORS[name]
    predicted = np.asarray(of_base["predicted"][of_loss if outcome == "dloss" else of_change])
    score, change, train, domain = [], [], [], []
    for row in of_base["trials"][regime]:
        number = TRAINS.index(row["train"])
        others = np.asarray([one != row["train"] for one in DOMAINS])
        score.append(predicted[number][others])
        change.append(np.asarray(row["zero-shot"][outcome])[others])
        train.append(np.full(others.sum(), number))
        domain.append(np.nonzero(others)[0])
    changes = np.concatenate(change)
    points = Points(np.concatenate(score), changes if signed else np.abs(changes), np.concatenate(train), signed)
    return Study(points, np.concatenate(domain))


def held_out_sets(study: Study) -> Iterator[Trial]:
    points = study.points
    for train in range(len(TRAINS)):
        yield Trial(points.only(points.train != train), points.only(points.train == train))


def held_out_models(studies: dict[str, Study], base: str) -> Iterator[Trial]:
    """Learned from the other base models, and there without the training set too."""
    others = [study.points for other, study in studies.items() if other != base]
    if not others:
        return
    past = Points(
        np.concatenate([one.score for one in others]),
        np.concatenate([one.change for one in others]),
        np.concatenate([one.train for one in others]),
        others[0].signed,
    )
    new = studies[base].points
    for train in range(len(TRAINS)):
        yield Trial(past.only(past.train != train), new.only(new.train == train))


def new_skills(study: Study) -> Iterator[Trial]:
    """Learned from the tags of one half of the world, held against those of the other: domains never seen before."""
    half = np.asarray([int(name[1]) % 2 for name in DOMAINS])[study.domain]
    points = study.points
    for train in range(len(TRAINS)):
        for seen in (0, 1):
            yield Trial(
                points.only((points.train != train) & (half == seen)),
                points.only((points.train == train) & (half != seen)),
            )


def other_regime(light: Study, other: Study) -> Iterator[Trial]:
    """Learned from light trainings."""
    for train in range(len(TRAINS)):
        yield Trial(light.points.only(light.points.train != train), other.points.only(other.points.train == train))


def figures_of(trials: Iterator[Trial]) -> dict[str, list[float]]:
    rows = []
    for trial in trials:
        line, constant = judge(trial.past, trial.new, fit_line), judge(trial.past, trial.new, fit_constant)
        low, high = np.percentile(trial.new.change, (5, 95))
        rows.append([*line, *constant, high - low])
    columns = list(zip(*rows, strict=True))
    names = (*FIGURES, *(f"constant_{name}" for name in FIGURES), "spread")
    return {name: [round(float(value), 4) for value in column] for name, column in zip(names, columns, strict=False)}


def tables(found: dict[str, Any]) -> str:
    """Markdown: means over held-out training sets, and the range of the coverage."""
    sections = []
    for question, outcomes in found.items():
        for outcome, predictors in outcomes.items():
            if not predictors:
                continue
            lines = [
                ["predictor", "inside", "width", "of a constant's", "of the spread", "interval score, of a constant's",
                 "error, of a constant's"],
                ["---"] * 7,
            ]  # fmt: skip
            lines += [[name, *cells(figures)] for name, figures in predictors.items()]
            rows = "".join(f"| {' | '.join(line)} |\n" for line in lines)
            sections.append(f"## {question}: {OUTCOMES[outcome]}\n\n{rows}")
    return "\n".join(sections)


def cells(figures: dict[str, list[float]]) -> list[str]:
    mean = {name: float(np.mean(values)) for name, values in figures.items()}
    inside = figures["coverage"]
    return [
        f"{mean['coverage']:.0%} [{min(inside):.0%}, {max(inside):.0%}]",
        f"{mean['width']:.3f}",
        f"{mean['width'] / mean['constant_width']:.2f}",
        f"{mean['width'] / mean['spread']:.2f}",
        f"{mean['interval_score'] / mean['constant_interval_score']:.2f}",
        f"{mean['error'] / mean['constant_error']:.2f}",
    ]
