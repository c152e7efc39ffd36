"""A demo's results, made up."""

from __future__ import annotations

import numpy as np

from sts_fast.demo import demo
from sts_fast.demo.demo import OUTCOMES, PREDICTORS, SCORE
from sts_fast.outcomes.outcomes import Outcome
from sts_fast.outcomes.validate import validate


def made_up(r: list[float], controls: dict[str, list[float]] | None = None) -> demo.Demo:
    """A demo whose correlations with every outcome are these."""
    trials = []
    rng = np.random.default_rng(0)
    for i, value in enumerate(r):
        scores = {f"d{j}": float(j + 1) for j in range(20)}
        outcomes = {name: Outcome(change=float(rng.normal())) for name in scores}
        predictors: dict[str, float | None] = {name: -0.5 for name in PREDICTORS} | {SCORE: value}
        predictors |= {name: values[i] for name, values in (controls or {}).items()}
        changes = {outcome: np.asarray([row.change for row in outcomes.values()]) for outcome in OUTCOMES}
        trials.append(
            demo.Trial(f"t{i}", 0, 0.5, validate(scores, outcomes), changes, dict.fromkeys(OUTCOMES, predictors))
        )
    figures = {"n_parameters": 1000, "shots": 4, "zero_shot_accuracy": 0.5, "few_shot_accuracy": 0.9}
    return demo.Demo({}, trials, 12, 2e-4, figures)
