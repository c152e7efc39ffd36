from __future__ import annotations

from pathlib import Path

import pytest
from html_tree import plain, rows_of, values_of
from scipy import stats
from written_run import Report, make_scores, page_of


def test_controls_are_held_against_every_score(full: Report) -> None:
    scores, page, _ = full
    domains = scores["domains"]
    rows = {cells[0].text(): cells[1:] for cells in rows_of(page.one("table", id="table-controls"))}
    assert list(rows) == [
        "random features", "least shifted features", "most active features", "cosine of the mean activations",
        "loss of the model before training", "accuracy of the model before training",
    ]  # fmt: skip
    for i, estimator in enumerate(("act", "icl", "act_sq")):
        score = [domain["scores"][estimator]["value"] for domain in domains]
        for label, control, quantity in (
            ("random features", "random", estimator),
            ("cosine of the mean activations", "cosine_of_means", "cosine"),
            ("loss of the model before training", "base_loss", "nll"),
        ):
            values = [domain["controls"][control][quantity] for domain in domains]
            [rho] = values_of(rows[label][i])
            assert rho == pytest.approx(stats.spearmanr(values, score).statistic)
            word = "nearly the same" if rho >= 0.8 else "similar" if rho >= 0.5 else "different"
            assert rows[label][i].text().endswith(word if rho > -0.5 else "reverse")
    assert rows["most active features"][0].text() == "1.00 nearly the same"
    assert [cell.text() for cell in rows["most active features"][1:]] == ["–", "–"]
    assert rows["accuracy of the model before training"][0].text() == "ranks nothing"
    text = plain(page.text())
    assert "STS_act: most active features puts the domains in nearly the same order" in text


def test_every_number_of_every_control_is_shown(full: Report) -> None:
    scores, page, _ = full
    table = page.one("table", id="table-controls-by-domain")
    for cells, domain in zip(rows_of(table), scores["domains"], strict=True):
        assert cells[0].text() == domain["name"]
        shown = [value for cell in cells[1:] for value in values_of(cell)]
        assert shown == [value for control in domain["controls"].values() for value in control.values()]


def test_controls_that_nobody_foresaw(tmp_path: Path) -> None:
    scores = make_scores(5)
    for i, domain in enumerate(scores["domains"]):
        domain["controls"] = {
            "my_own": {"a_b": float(i)}, "bare": 1.0 - i, "<i>": {"<b>": 1}, "null": {"act": None}, "none": {},
        }  # fmt: skip
        if i == 2:
            del domain["controls"]["bare"]
    page = page_of(tmp_path, scores)
    rows = {cells[0].text(): cells[1:] for cells in rows_of(page.one("table", id="table-controls"))}
    assert set(rows) == {"my own", "bare", "<i>"}
    assert rows["my own"][0].text() == "−1.00 reverse"
    assert rows["bare"][0].text() == "1.00 nearly the same"
