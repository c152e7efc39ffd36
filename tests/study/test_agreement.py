"""The study's table of forecasts, from a case written by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from study.real import agreement, runs, table
from study.real.changes import Change, Training

RISES = {"a": -0.5, "b": 0.1, "c": 0.4, "d": -0.2, "gsm8k": -3.0}  # of the loss
SEEN = {"a": 2.0, "b": -1.0, "c": -2.0, "d": 1.0, "gsm8k": 0.0}


def training(way: str = "light", seed: int = 0, *, noise: float = 0.0) -> Training:
    rng = np.random.default_rng(1)
    changes = {domain: Change(rise, 0.01, rise + rng.normal(0, 0.01 + noise, 32)) for domain, rise in RISES.items()}
    record = {
        "train": "gsm8k", "way": way, "seed": seed, "all_rates_seconds": 60.0, "measure_seconds": 100.0,
        "domains": {domain: {} for domain in RISES},
    }  # fmt: skip
    return Training(f"{way} gsm8k {seed}", record, {"loss": changes})


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    runs.write_json(tmp_path / "split.json", {"design": {"trains": ["gsm8k"], "domains": ["a", "b"]}})
    numbers = {domain: {"act": value, "flat": 1.0} for domain, value in SEEN.items()}
    record = {"command": "sts-fast", "seconds": 30.0, "peak_mb": 700, "15": {"gsm8k": numbers}}
    (tmp_path / "forecasts").mkdir()
    runs.write_json(tmp_path / "forecasts" / "paper.json", record)
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    return tmp_path


def test_r_over_the_domains_that_are_not_its_own(results: Path) -> None:
    others = ["a", "b", "c", "d"]
    falls = np.asarray([-RISES[domain] for domain in others])
    seen = np.asarray([SEEN[domain] for domain in others])
    [found] = agreement.agreements([training(), training(seed=1), training("long")])  # `flat` says nothing
    assert (found.forecast, found.number) == ("paper, layer 15", "act")
    assert found.r["signed"] == [pytest.approx(np.corrcoef(seen, falls)[0, 1])]
    assert found.r["size"] == [pytest.approx(np.corrcoef(seen, np.abs(falls))[0, 1])]


def test_outcomes_that_are_not_reliable_do_not_count(results: Path) -> None:
    assert agreement.counted([training(noise=9.0)]) == []
    assert agreement.agreements([training(noise=9.0)]) == []


def test_cost_is_a_share_of_training_and_evaluating(results: Path) -> None:
    assert agreement.costs([training(), training(seed=1)]) == [("paper", 30.0, 30 / (60 + 100 * 2 / 5), 700)]


def test_page_has_ceiling_and_cost(results: Path) -> None:
    page = table.forecasts_page([training()])
    assert "| paper, layer 15 | act |" in page
    assert "*ceiling*" in page
    assert "| paper | 30 | 30% | 700 |" in page
