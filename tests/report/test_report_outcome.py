from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from html_tree import plain, read_page, rows_of, values_of
from written_run import Report, make_scores, write_scores, write_validation

from sts_fast.forecast.run import VALIDATION_FILE, save_beside
from sts_fast.report import build_report
from sts_fast.report.outcome import outcome_section, outcome_warnings


def test_outcome_numbers(full: Report) -> None:
    _, page, path = full
    document = json.loads((path.parent / VALIDATION_FILE).read_text())
    section = page.one("section", **{"aria-labelledby": "outcome"})
    assert section.one("p", class_="verdict").text() == document["verdict"]
    rows = {cells[0].text(): cells[1:] for cells in rows_of(section.one("table", id="table-outcome"))}
    wanted = {
        "STS_act: Pearson r": document["size"]["pearson"],
        "STS_act: Spearman": document["size"]["spearman"],
        "STS_act: R²": document["size"]["r_squared"],
        "STS_act: Pearson r with the signed change": document["signed"]["pearson"],
        "STS_act: Spearman with the signed change": document["signed"]["spearman"],
        "random features": document["controls"]["random"]["pearson"],
        "loss of the model before training": document["controls"]["base_loss nll"]["pearson"],
    }
    for label, estimate in wanted.items():
        value, again, others, p = rows[label]
        assert values_of(value) == [estimate["value"]]
        for cell, key in ((again, "ci"), (others, "ci_domains")):
            assert cell.text() == " to ".join(f"{bound:.2f}" for bound in estimate[key]).replace("-", "−")
        assert float(p.text()) == pytest.approx(estimate["p_one_sided"], rel=0.05)
    text = plain(section.text())
    limits = document["limits"]
    assert f"would reach r = {limits['ceiling']:.2f}" in text
    assert f"exceeds r = 0.7 in {limits['chance_above_good']:.1%} of cases" in text
    assert f"{limits['n_distinguishable']} of 6 changes differ from zero" in text
    by_domain = rows_of(section.one("table", id="table-outcome-by-domain"))
    for cells, domain in zip(by_domain, sorted(document["domains"], key=lambda d: -d["score"]), strict=True):
        assert cells[0].text() == domain["name"]
        shown = [value for cell in cells[1:] for value in values_of(cell)]
        outcome = domain["outcome"]
        assert shown == [
            domain["score"], *domain["score_ci"], *(outcome[key] for key in ("before", "after", "change", "stderr")),
            domain["z"],
        ]  # fmt: skip
    falling = sum(domain["outcome"]["change"] < 0 for domain in document["domains"])
    assert len(section.all("circle", class_="falling")) == falling > 0


def paths_in(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key, value in document.items() if isinstance(document, dict) else enumerate(document):
        yield (*path, key)
        if isinstance(value, (dict, list)) and value:
            yield from paths_in(value, (*path, key))


def test_outcome_with_anything_missing_or_of_another_type(tmp_path: Path) -> None:
    scores = make_scores(4)
    write_scores(tmp_path, scores)
    document = write_validation(tmp_path, scores)
    # The first of several domains and controls stands for all.
    paths = [path for path in paths_in(document) if not any(isinstance(key, int) and key > 0 for key in path)]
    paths = [path for path in paths if path[0] != "controls" or path[1:2] in ((), ("random",))]
    assert len(paths) > 50
    for number, path in enumerate(paths):
        broken = copy.deepcopy(document)
        *parents, last = path
        holder = broken
        for key in parents:
            holder = holder[key]
        if number % 2:
            del holder[last]
        else:
            holder[last] = ["text", 5, None, {}, [1], True][number % 6]
        outcome_section(broken)
        outcome_warnings(broken)
        if number % 12 == 0 or len(path) == 1:
            save_beside(tmp_path, VALIDATION_FILE, broken)
            assert "Did the forecast come true?" in read_page(build_report(tmp_path)).text()
    save_beside(tmp_path, VALIDATION_FILE, {})
    assert "validation.json contains no comparison" in read_page(build_report(tmp_path)).text()
