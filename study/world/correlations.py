"""From predictions and outcomes to correlations, one per training."""

from __future__ import annotations

from typing import Any

import numpy as np

from study.world.grounds import Ground
from study.world.predictors import FEW_SHOT, REFERENCE, SIGNED, TOGETHER, WITHOUT_GRADIENTS

OUTCOMES = ("dP", "dloss", "daccuracy")
SHOTS = ("zero-shot", "few-shot")
Z_95 = 1.96


def compact(
    ground: Ground, predicted: dict[str, Any], trials: dict[str, list[dict[str, Any]]], figures: Any
) -> dict[str, Any]:
    """Per way of training and outcome, for every predictor, a list over trainings.

    r: Pearson correlation over the 71 other domains; 'signed' of the numbers, 'size' of their absolute values;
    auc: share of (risen, fallen) pairs of domains in the right order; auc_distinct: only of those that changed
        by more than 1.96 standard errors
    """
    found: dict[str, Any] = {"organism": figures, "loss_of_training_sets": rounded(predicted["loss of training sets"])}
    for regime, rows in trials.items():
        of_regime: dict[str, Any] = {"trainings": [[row["train"], row["seed"]] for row in rows]}
        for shots in SHOTS:
            for outcome in OUTCOMES:
                of_regime[f"{shots} {outcome}"] = {
                    name: spread(ground, np.asarray(predicted[columns[outcome == "dloss"]]), rows, shots, outcome)
                    for name, columns in predictors().items()
                }
        found[regime] = of_regime
    return found


def predictors() -> dict[str, tuple[str, str]]:
    return TOGETHER | SIGNED | FEW_SHOT | REFERENCE | {name: (name, name) for name in WITHOUT_GRADIENTS}


def spread(ground: Ground, forecast: Any, rows: list[dict[str, Any]], shots: str, outcome: str) -> dict[str, Any]:
    found: dict[str, list[Any]] = {"signed": [], "size": [], "auc": [], "auc_distinct": []}
    for row in rows:
        others = np.asarray([name != row["train"] for name in ground.domains])
        x = forecast[ground.trains.index(row["train"])][others]
        y = np.asarray(row[shots][outcome])[others]
        found["signed"].append(pearson(x, y))
        found["size"].append(pearson(np.abs(x), np.abs(y)))
        found["auc"].append(auc(x, y))
        z = np.asarray(row[shots].get(f"z_{outcome}", row[shots]["z_dP"]))[others]
        distinct = np.abs(z) > Z_95
        found["auc_distinct"].append(auc(x[distinct], y[distinct]))
    return {name: rounded(values) for name, values in found.items()}


def pearson(x: Any, y: Any) -> float | None:
    x, y = x - x.mean(), y - y.mean()
    norm = np.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / norm) if norm > 0 else None


def auc(x: Any, y: Any) -> float | None:
    risen, fallen = x[y > 0][:, None], x[y < 0][None]
    if not risen.size or not fallen.size:
        return None
    return float((risen > fallen).mean() + 0.5 * (risen == fallen).mean())


def rounded(values: Any) -> list[float | None]:
    return [None if value is None else round(float(value), 4) for value in values]
