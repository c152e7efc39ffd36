"""Intervals of the change itself, learned from past trainings: how often they hold, and how wide they are.

python -m study.world calibrate     # of every base model that `run` has left in build/study
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sts_fast.outcomes.calibration.conformal import Points, fit_constant, fit_line, judge
from study.world.trials import DOMAINS, TRAINS

RESULTS = Path(__file__).parent / "results" / "calibration.json"
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
SETS, MODELS = "Training sets held out", "Base models held out, and training sets"
SKILLS = "Training sets held out, and half of the tags"
REGIME = "Training sets held out, learned from light trainings"
HEADER = """# Calibration: intervals of 90%, learned from past trainings

Written by `python -m study.world calibrate`; what was primary, and what was chosen on `package`, is in
[the study's README](../README.md). In each cell: changes inside, mean [lowest, highest] over the twelve training
sets held out; width, and interval score (smaller is better), as shares of those of a constant: the mean past change
with an interval of the same making. Predictors without a sign forecast the size of the change."""
FIGURES = ("coverage", "width", "interval_score", "error")


@dataclass(frozen=True)
class Trial:
    """What one calibration is learned from, and the points of one training set that it is held against."""

    past: Points
    new: Points


def calibrate(work: Path) -> dict[str, Any]:
    """Question -> way of training -> outcome -> predictor -> base model -> figures (see figures_of)."""
    raw = {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for base in (DESIGNED_ON, *JUDGED_ON)
        if (path := work / f"{base}.json").is_file()
    }
    if not raw:
        raise SystemExit(f"{work} holds no results: python -m study.world run package first")
    found: dict[str, Any] = {}
    for base, regime, outcome, name in cases(raw):
        studies = {one: points_of(raw[one], regime, name, outcome) for one in raw if regime in raw[one]["trials"]}
        questions = {SETS: held_out_sets(studies[base]), MODELS: held_out_models(studies, base)}
        if regime == "light":
            questions[SKILLS] = new_skills(studies[base])
        else:
            questions[REGIME] = other_regime(points_of(raw[base], "light", name, outcome), studies[base])
        for question, trials in questions.items():
            if figures := figures_of(trials):
                of_regime = found.setdefault(question, {}).setdefault(regime, {})
                of_regime.setdefault(outcome, {}).setdefault(name, {})[base] = figures
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


def figures_of(trials: Iterator[Trial]) -> dict[str, Any]:
    """Means over the held-out training sets, and the coverage of each.

    width, interval_score, error: see calibration.conformal.Assessment; constant_*: of the constant; spread:
    from the 5th to the 95th percentile of the changes.
    """
    rows = []
    for trial in trials:
        line, constant = judge(trial.past, trial.new, fit_line), judge(trial.past, trial.new, fit_constant)
        low, high = np.percentile(trial.new.change, (5, 95))
        rows.append([*line, *constant, high - low])
    if not rows:
        return {}
    columns = np.asarray(rows).T
    names = (*FIGURES, *(f"constant_{name}" for name in FIGURES), "spread")
    found = {name: round(float(column.mean()), 4) for name, column in zip(names, columns, strict=True)}
    return {**found, "coverage_of_each": [round(float(value), 3) for value in columns[0]]}


def tables(found: dict[str, Any]) -> str:
    """Markdown: a table for each question and way of training, a row for each outcome and predictor."""
    sections = [f"{HEADER}\n"]
    for question, regimes in found.items():
        for regime, outcomes in regimes.items():
            bases = list(next(iter(next(iter(outcomes.values())).values())))
            lines = [["outcome", "predictor", *bases], ["---"] * (2 + len(bases))]
            for outcome, predictors in outcomes.items():
                for name, of_bases in predictors.items():
                    lines.append([OUTCOMES[outcome], name, *(cell(of_bases[base]) for base in bases)])
            rows = "".join(f"| {' | '.join(line)} |\n" for line in lines)
            sections.append(f"## {question}: {regime}\n\n{rows}")
    return "\n".join(sections)


def cell(figures: dict[str, Any]) -> str:
    each = figures["coverage_of_each"]
    width, score = (figures[name] / figures[f"constant_{name}"] for name in ("width", "interval_score"))
    return f"{figures['coverage']:.0%} [{min(each):.0%}, {max(each):.0%}]; {width:.2f}; {score:.2f}"
