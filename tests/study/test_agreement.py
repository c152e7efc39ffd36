"""The study's table of forecasts, from a case written by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from study.real import agreement, forecasts, runs, table
from study.real.changes import Change, Training

RISES = {"a": -0.5, "b": 0.1, "c": 0.4, "d": -0.2, "gsm8k": -3.0}  # of the loss
SEEN = {"a": 2.0, "b": -1.0, "c": -2.0, "d": 1.0, "gsm8k": 0.0}
STEPPED = {"a": 1.0, "b": 2.0, "c": -3.0, "d": -0.5, "gsm8k": 9.0}  # one of four pairs in the wrong order
SHARE = {"a": 0.1, "b": 0.4, "c": 0.2, "d": 0.3, "gsm8k": 0.9}
OTHERS = ["a", "b", "c", "d"]


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
    part = {"trains": ["gsm8k"], "domains": ["a", "b"]}
    runs.write_json(tmp_path / "split.json", {"design": part, "judged": part})
    numbers = {
        domain: {"act": value, "flat": 1.0, "step_loss": STEPPED[domain], "text_digits share": SHARE[domain]}
        for domain, value in SEEN.items()
    }
    record = {"command": "sts-fast", "seconds": 30.0, "peak_mb": 700, "7": {"gsm8k": numbers}, "15": {"gsm8k": numbers}}
    runs.write_json(tmp_path / "forecasts" / "design" / "paper.json", record)
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    return tmp_path


def numbers(part: str = "design") -> dict[tuple[str, str], agreement.Number]:
    return {(number.name, number.layer): number for number in agreement.numbers_of(part)}


def test_r_over_the_domains_that_are_not_its_own(results: Path) -> None:
    falls = np.asarray([-RISES[domain] for domain in OTHERS])
    seen = np.asarray([SEEN[domain] for domain in OTHERS])
    found = agreement.agreement(numbers()["act", "15"], [training()])
    assert found.r["signed"] == [pytest.approx(np.corrcoef(seen, falls)[0, 1])]
    assert found.r["size"] == [pytest.approx(np.corrcoef(seen, np.abs(falls))[0, 1])]
    assert np.isnan(agreement.agreement(numbers()["flat", "15"], [training()]).r["signed"]).all()


def test_size_of_a_signed_number_is_its_distance_from_zero(results: Path) -> None:
    falls = np.asarray([-RISES[domain] for domain in OTHERS])
    stepped = np.asarray([STEPPED[domain] for domain in OTHERS])
    found = agreement.agreement(numbers()["step_loss", "15"], [training()])
    assert found.r["signed"] == [pytest.approx(np.corrcoef(stepped, falls)[0, 1])]
    assert found.r["size"] == [pytest.approx(np.corrcoef(np.abs(stepped), np.abs(falls))[0, 1])]
    # a and d fall, b and c rise: only d < b is wrong, and a < b.
    assert found.auc == [0.5]


def test_partial_r_is_that_of_residuals(results: Path) -> None:
    falls = np.asarray([-RISES[domain] for domain in OTHERS])
    seen = np.asarray([SEEN[domain] for domain in OTHERS])
    share = np.stack([np.ones(4), [SHARE[domain] for domain in OTHERS]], axis=1)
    left = [values - share @ np.linalg.lstsq(share, values, rcond=None)[0] for values in (seen, falls)]
    found = agreement.agreement(numbers()["act", "15"], [training()], numbers()["text_digits share", "7"])
    assert found.given["signed"] == [pytest.approx(np.corrcoef(*left)[0, 1])]


def test_numbers_of_texts_are_listed_once(results: Path) -> None:
    assert sorted(numbers()) == [
        ("act", "15"), ("act", "7"), ("flat", "15"), ("flat", "7"), ("step_loss", "15"), ("step_loss", "7"),
        ("text_digits share", "7"),
    ]  # fmt: skip


def test_outcomes_that_are_not_reliable_do_not_count(results: Path) -> None:
    assert agreement.counted([training(noise=9.0)], "design") == []
    chosen = agreement.counted([training(), training(seed=1), training("long")], "design")
    assert [t.name for t in chosen] == ["light gsm8k 0"]


def test_cost_is_a_share_of_training_and_evaluating(results: Path) -> None:
    assert agreement.costs([training()], "design") == {"paper": (30.0, 30 / (60 + 100 * 2 / 5), 700)}


def test_page_has_ceiling_and_cost(results: Path) -> None:
    page = table.forecasts_page([training()])
    assert "| paper, layer 15 | act |" in page
    assert "*ceiling*" in page
    assert "| paper | 30 | 30% | 700 |" in page
    assert "Judged" not in page


def test_judged_part_needs_what_is_frozen(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecasts, "FROZEN", results / "frozen.json")
    with pytest.raises(SystemExit, match="judged part is forecast once"):
        forecasts.forecast(tmp_path, [], "judged", print)
    (results / "forecasts" / "judged").mkdir()
    (results / "forecasts" / "design" / "paper.json").rename(results / "forecasts" / "judged" / "paper.json")
    text = ["paper", "7", "text_digits share"]
    runs.write_json(
        results / "frozen.json", {"forecasts": ["paper"], "numbers": [["paper", "15", "act"], text], "control": text}
    )
    page = table.forecasts_page([training()])
    assert "act, layer 15" in (results / "cost.svg").read_text()
    assert "## Judged part, light training" in page
    assert "r given text_digits share" in page
    assert "| paper, layer 15 | act |" in page
    assert "step_loss" not in page
