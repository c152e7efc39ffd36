"""Go or no-go, from a case written by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from study.real.agreement import Number
from study.real.changes import Training
from study.real.decisions import decisions


def training(train: str, rises: dict[str, float]) -> Any:
    changes = {"loss": {domain: SimpleNamespace(mean=rise) for domain, rise in rises.items()}}
    return Training(f"light {train} 0", {"train": train}, changes)  # type: ignore[arg-type]


def test_stops_by_hand() -> None:
    # A forecast falls where the loss rises; half of the rise, in both sets.
    made = [training("a", {"x": 0.6, "y": -0.2, "z": 0.3}), training("b", {"x": 0.2, "y": 0.4, "z": 1.0})]
    values = {"a": {"x": -0.3, "y": 0.1, "z": -0.05}, "b": {"x": -0.3, "y": -0.2, "z": -0.5}}
    low, middle, high = decisions(Number("trial", "15", "trial_loss", values, is_signed=True), made)
    scale_of_b = (0.3 * 0.6 + 0.1 * 0.2 + 0.05 * 0.3) / (0.3**2 + 0.1**2 + 0.05**2)  # learned from a
    scale_of_a = (0.3 * 0.2 + 0.2 * 0.4 + 0.5 * 1.0) / (0.3**2 + 0.2**2 + 0.5**2)
    rises = np.array([0.6, -0.2, 0.3, 0.2, 0.4, 1.0])
    forecast = np.array([0.3, -0.1, 0.05, 0.3, 0.2, 0.5])
    scaled = forecast * np.repeat([scale_of_a, scale_of_b], 3)
    for found, limit in ((low, 0.1), (middle, 0.25), (high, 0.5)):
        stop, bad = scaled > limit, rises > limit
        assert (found.limit, found.n, found.n_bad) == (limit, 6, bad.sum())
        assert found.stopped == pytest.approx(stop.mean())
        assert found.wrong == pytest.approx((stop & ~bad).sum() / stop.sum())
        assert found.missed == pytest.approx((bad & ~stop).sum() / bad.sum())
    assert high.auc == pytest.approx((3.5 + 4) / 8)  # .3 ties with one of four others
    assert middle.stopped == 4 / 6
    assert middle.wrong == 1 / 4


def test_nothing_to_stop() -> None:
    made = [training("a", {"x": -0.6, "y": -0.2}), training("b", {"x": -0.2, "y": -0.4})]
    values = {"a": {"x": 0.3, "y": 0.1}, "b": {"x": 0.3, "y": 0.2}}
    for found in decisions(Number("trial", "15", "trial_loss", values, is_signed=True), made):
        assert found.auc is None
        assert found.stopped == 0
        assert np.isnan([found.wrong, found.missed]).all()
