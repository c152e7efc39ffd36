"""Go or no-go: would a forecast have stopped the trainings that raise a domain's loss by more than so many nats?

Each training set on each domain is one decision: whoever watches this domain stops where the forecast, in nats, is
above the limit. The scale from forecast to nats is learned from the other training sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sts_fast.outcomes.validate.statistics import sign_auc
from study.real.agreement import Number
from study.real.changes import Doubles, Training

LIMITS = (0.1, 0.25, 0.5)  # nats per token


@dataclass(frozen=True)
class Decisions:
    """Of one limit, over all decisions.

    limit:   rise of the loss that is too much, in nats per token
    n, n_bad: decisions; those where the loss rose by more
    auc:     share of the pairs of one of each that the forecast puts in the right order; None without both
    stopped: share of decisions that the forecast stops
    wrong:   share of the stops where the loss rose by no more; NaN where nothing is stopped
    missed:  share of the bad ones that are not stopped; NaN where there are none
    """

    limit: float
    n: int
    n_bad: int
    auc: float | None
    stopped: float
    wrong: float
    missed: float


def decisions(number: Number, trainings: Sequence[Training]) -> list[Decisions]:
    """The decisions of a signed number at each limit."""
    rises, forecasts = [], []
    for training in trainings:
        of_train = number.values.get(training.record["train"], {})
        domains = [domain for domain in training.others if domain in of_train]
        rises.append(np.asarray([training.changes["loss"][domain].mean for domain in domains]))
        forecasts.append(-np.asarray([of_train[domain] for domain in domains]))
    scaled = np.concatenate([forecast * _scale(rises, forecasts, i) for i, forecast in enumerate(forecasts)])
    rise, forecast = np.concatenate(rises), np.concatenate(forecasts)
    return [_at(limit, rise, forecast, scaled) for limit in LIMITS]


def _scale(rises: Sequence[Doubles], forecasts: Sequence[Doubles], left_out: int) -> float:
    """Nats of rise for one of the forecast, by least squares over the other training sets."""
    x, y = (
        np.concatenate([of for i, of in enumerate(values) if i != left_out]) if len(values) > 1 else np.zeros(0)
        for values in (forecasts, rises)
    )
    return float(x @ y / (x @ x)) if x.any() else 1.0


def _at(limit: float, rise: Doubles, forecast: Doubles, scaled: Doubles) -> Decisions:
    bad, stop = rise > limit, scaled > limit
    return Decisions(
        limit,
        len(rise),
        int(bad.sum()),
        sign_auc(forecast, np.where(bad, 1.0, -1.0)),
        float(stop.mean()),
        float((~bad[stop]).mean()) if stop.any() else float("nan"),
        float((~stop[bad]).mean()) if bad.any() else float("nan"),
    )
