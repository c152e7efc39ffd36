from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
from html_tree import plain, read_page, rows_of, values_of
from written_run import D_SAE, TOP_N, Report, make_importance, make_scores, page_of, write_scores, write_shift

from sts_fast.report import build_report


def test_concentration_curve(full: Report) -> None:
    _, page, _ = full
    cumulative = np.cumsum(np.sort(make_importance())[::-1]) / make_importance().sum()
    text = plain(page.text())
    assert f"The 30 features of D_N have {cumulative[TOP_N - 1]:.1%} of the shift" in text
    half, most = int(np.argmax(cumulative >= 0.5)) + 1, int(np.argmax(cumulative >= 0.9)) + 1
    assert f"Half of it lies in the top {half}, 90% in the top {most}." in text
    assert "resampling the 200 training prompts keeps 90.0% of it (85.0% to 95.0% in 32 resamplings)" in text
    [line] = [node for node in page.walk() if node.tag == "polyline"]
    points = [tuple(map(float, point.split(","))) for point in line.attrs["points"].split()]
    for x, y in points:
        rank = round(D_SAE ** (x / 1000))
        assert 1 - y / 1000 == pytest.approx(cumulative[rank - 1], abs=1e-3)
    assert points[0][0] == 0
    assert points[-1] == (1000, 0)
    [mark] = [node for node in page.all("circle", class_="dot") if node.attrs["cy"] and not node.all("title")][-1:]
    assert float(mark.attrs["cx"].rstrip("%")) == pytest.approx(100 * math.log(TOP_N) / math.log(D_SAE), abs=0.01)


def test_most_active_features_have_a_curve_too(tmp_path: Path) -> None:
    scores = make_scores(5)
    scores["settings"]["dims"] = "active"
    for feature in scores["shifted_features"]:
        feature["mean_squared_shift"] = None
    write_scores(tmp_path, scores)
    write_shift(tmp_path, scores)
    page = read_page(build_report(tmp_path))
    assert "How concentrated is the activity?" in page.text()
    assert "no shift was measured" in page.text()
    assert page.all("polyline")


def test_features_and_where_they_fire(full: Report) -> None:
    scores, page, _ = full
    first, rest = page.one("section", **{"aria-labelledby": "features"}).all("table", class_="feature-table")
    rows = rows_of(first)
    assert (len(rows), len(rows_of(rest))) == (20, TOP_N - 20)
    for rank, (cells, feature) in enumerate(zip(rows + rows_of(rest), scores["shifted_features"], strict=True), 1):
        index, share, activation, label, promoted, fires = cells
        assert index.text().split() == [f"{rank}.", str(feature["index"])]
        assert values_of(share) == [feature["share"]]
        assert values_of(activation) == [feature["mean_activation"]]
        assert (feature["label"] or "") in label.text()
        assert label.one("a").attrs["href"] == feature["neuronpedia"]
        assert [token.text() for token in promoted.all("code")] == ["␣the", "↵", "law"]
        found = fires.all("li")
        assert [mark.text() for mark in fires.all("mark")] == ["␣tok"] * (5 if rank <= 25 else 0)
        if found:
            assert plain(found[0].text()) == "before ↵ ␣tok ⇥ after activation 9.00 · domain 1 · q0"
            values = [re.search(r"activation ([\d.]+)", item.text()) for item in found]
            assert [value[1] for value in values if value] == ["9.00", "8.00", "7.00", "6.00", "5.00"]


def test_what_is_not_known_about_features_is_left_out(tmp_path: Path) -> None:
    page = page_of(tmp_path, make_scores())
    headings = [
        th.text() for th in page.all("table", class_="feature-table")[0].all("th") if th.attrs["scope"] == "col"
    ]
    assert headings == ["Feature", "Share of shift", "Mean activation"]
    assert not page.all("mark")
    assert not page.all("polyline")
    assert not page.all("section", **{"aria-labelledby": "outcome"})
