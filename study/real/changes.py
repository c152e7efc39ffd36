"""What each training changed: per domain with errors, how reliably, and what that lets a forecast reach."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from study.real.measure import MEASURES, paired
from study.real.runs import BASE
from study.real.sets import own_domains

Doubles = NDArray[np.float64]

N_HALVINGS = 100
LEAST_RELIABLE = 0.8  # a training whose primary outcome is less reliable is left out of verdicts
CLEAR = 1.96  # standard errors


@dataclass(frozen=True)
class Change:
    """One measure's change in one domain: mean over questions, its standard error, and the questions' own."""

    mean: float
    stderr: float
    of_questions: Doubles

    @property
    def is_clear(self) -> bool:
        return abs(self.mean) > CLEAR * self.stderr


@dataclass(frozen=True)
class Training:
    """A training's record beside the base model's; `changes[measure][domain]` for every domain."""

    name: str
    record: dict[str, Any]
    changes: dict[str, dict[str, Change]]

    @property
    def others(self) -> list[str]:
        """The domains that are not its own."""
        return [domain for domain in self.changes["loss"] if domain not in own_domains(self.record["train"])]

    def reliability(self, measure: str = "loss", *, size: bool = False) -> float:
        """Of the change over other domains: that of two random halves of the questions, corrected to full length."""
        rows = [self.changes[measure][domain].of_questions for domain in self.others]
        return split_half([row for row in rows if len(row) >= 4], size=size)

    @property
    def counts(self) -> bool:
        return self.reliability() >= LEAST_RELIABLE


def trainings(outcomes: dict[str, dict[str, Any]]) -> list[Training]:
    """All trainings that have been run, by way, set and seed."""
    before = outcomes[BASE]["domains"]
    found = []
    for name, record in outcomes.items():
        if name != BASE:
            changes = {
                measure: {
                    domain: Change(*paired(before[domain][measure], values[measure]))
                    for domain, values in record["domains"].items()
                }
                for measure in MEASURES
            }
            found.append(Training(name, record, changes))
    return sorted(found, key=lambda t: (t.record["way"], t.record["train"], t.record["seed"]))


def split_half(rows: list[Doubles], *, size: bool = False) -> float:
    """Spearman-Brown's reliability of the rows' means, mean over N_HALVINGS random halvings of each row's numbers.

    With `size`, of the absolute means.
    """
    rng = np.random.default_rng(0)
    found = []
    for _ in range(N_HALVINGS):
        halves = np.empty((2, len(rows)))
        for i, row in enumerate(rows):
            mixed = rng.permutation(row)
            middle = len(row) // 2
            halves[:, i] = mixed[:middle].mean(), mixed[middle:].mean()
        r = float(np.corrcoef(np.abs(halves) if size else halves)[0, 1])
        found.append(2 * r / (1 + r))
    return float(np.mean(found))


def ceiling(reliability: float) -> float:
    """The largest r that a perfect forecast can be expected to have with an outcome so reliable."""
    return max(reliability, 0.0) ** 0.5
