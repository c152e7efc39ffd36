"""What the report shows of a comparison with outcomes, beside the numbers of validation.json."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from html_tree import Node, read_page
from written_run import make_scores, write_scores

from sts_fast.forecast.run import VALIDATION_FILE, save_beside
from sts_fast.outcomes.outcomes import Outcome
from sts_fast.outcomes.validate import validate
from sts_fast.report import build_report


def shown(cell: Node) -> str:
    return re.sub("[\u2068\u2069]", "", cell.text())


@pytest.fixture
def scores() -> dict[str, Any]:
    document = copy.deepcopy(make_scores(6))
    rng = np.random.default_rng(0)
    for domain in document["domains"]:
        domain["controls"] |= {
            "text_digits": {"share": float(rng.uniform())},
            "text_length": {"words": float(rng.uniform(5, 90))},
        }
    return document


def test_partial_correlations_given_the_text_are_shown(scores: dict[str, Any], tmp_path: Path) -> None:
    folder = write_scores(tmp_path / "run", scores)
    rng = np.random.default_rng(1)
    outcomes = {domain["name"]: Outcome(float(rng.normal(0, 0.1)), stderr=0.02) for domain in scores["domains"]}
    document = validate(folder, outcomes).to_dict()
    save_beside(folder, VALIDATION_FILE, document)
    page = read_page(build_report(folder))
    table = page.one("table", id="table-outcome").one("tbody")
    rows = {
        shown(cells[0]): cells[1:]
        for row in table.all("tr")
        if (cells := [cell for cell in row.children if isinstance(cell, Node)])
    }
    labels = {
        "text_digits share": "words with a digit in the questions (no model)",
        "text_length words": "length of the questions (no model)",
    }
    for key, words in (
        ("size_given_text", "partial Pearson r, given"),
        ("signed_given_text", "partial Pearson r with"),
    ):
        partial = document[key]["pearson"]
        [label] = [label for label in rows if label.startswith(f"STS_act: {words}")]
        assert label.endswith(labels[document[key]["control"]])
        value, _, others, chance = rows[label]
        assert [float(data.attrs["value"]) for data in value.all("data")] == [partial["value"]]
        bounds = " to ".join(f"{bound:.2f}" for bound in partial["ci_domains"]).replace("-", "−")
        assert others.text() == bounds
        assert not re.search(r"\d", chance.text())
    assert set(labels.values()) <= {*rows}
    section = shown(page.one("section", **{"aria-labelledby": "outcome"}))
    verdict = " ".join(section.split())
    assert document["verdict"] in verdict
    assert "the best of the controls that need no model" in verdict
    assert "Partial correlations are given " + labels[document["size_given_text"]["control"]] in " ".join(
        section.split()
    )
    # And among the controls of the forecast.
    controls = shown(page.one("table", id="table-controls"))
    assert all(label in controls for label in labels.values())


def test_a_run_without_text_controls_shows_none(tmp_path: Path) -> None:
    document = make_scores(6)
    folder = write_scores(tmp_path / "run", document)
    outcomes = {domain["name"]: Outcome(0.1 * i, stderr=0.02) for i, domain in enumerate(document["domains"])}
    save_beside(folder, VALIDATION_FILE, validate(folder, outcomes).to_dict())
    text = read_page(build_report(folder)).text()
    assert "Did the forecast come true?" in text
    assert "partial Pearson" not in text.lower()
