from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from html_tree import plain, rows_of, values_of
from written_run import Report, make_scores, make_signed, page_of


def scores_by(scores: dict[str, Any], estimator: str) -> dict[str, Any]:
    return {domain["name"]: domain["scores"][estimator] for domain in scores["domains"]}


@pytest.mark.parametrize("field", ["adapter", "adapter_loss", "ntk", "ntk_loss"])
def test_signed_dots_lie_on_their_side_of_zero(full: Report, field: str) -> None:
    scores, page, _ = full
    factor = 100 if field == "adapter" else 1  # points
    found = scores_by(scores, field)
    wanted = sorted(found, key=lambda name: -found[name]["value"])
    rows = rows_of(page.one("table", id=f"table-{field}"))
    assert [cells[0].text() for cells in rows] == wanted
    for cells, name in zip(rows, wanted, strict=True):
        low, high = (factor * bound for bound in found[name]["ci"])
        assert values_of(cells[1]) == pytest.approx([factor * found[name]["value"]])
        assert values_of(cells[2]) == pytest.approx([low, high])
        assert cells[3].text() == ("better" if low > 0 else "worse" if high < 0 else "open")

    [svg] = [node for node in page.all("svg") if node.attrs.get("aria-labelledby", "").startswith(f"signed-{field}-f")]
    ticks = {float(text.text().replace("−", "-")): text.attrs["x"] for text in svg.all("text", class_="tick")}
    low, high = min(ticks), max(ticks)
    zero, unit = -100 * low / (high - low), 100 / (high - low)
    for dot, name in zip(svg.all("circle"), wanted, strict=True):
        value, (low, high) = factor * found[name]["value"], found[name]["ci"]
        assert ("worse" in dot.attrs["class"]) == (value < 0)
        assert ("other" in dot.attrs["class"]) == (low <= 0 <= high)
        assert float(dot.attrs["cx"].rstrip("%")) == pytest.approx(zero + unit * value, abs=0.02)
    assert [text.text() for text in svg.all("text", class_="axis")][::2] == ["← worse", "better →"]


def test_signed_section_in_plain_words(full: Report) -> None:
    scores, page, _ = full
    section = page.one("section", **{"aria-labelledby": "signed"})
    text = plain(section.text())
    values = {name: 100 * score["value"] for name, score in scores_by(scores, "adapter").items()}
    best, worst = max(values, key=lambda name: values[name]), min(values, key=lambda name: values[name])
    shown = {name: f"{values[name]:+.1f}".replace("-", "−") for name in (best, worst)}
    for name in (best, worst):
        low, high = scores_by(scores, "adapter")[name]["ci"]
        shown[name] += " points" + (", with zero inside its interval" if low <= 0 <= high else "")
    lead = plain(page.all("p", class_="lead")[0].text())
    improved, harmed = f"improve {best} most ({shown[best]})", f"harm {worst} most ({shown[worst]})"
    assert lead == f"Training is forecast to {improved} and to {harmed}, by adapter."
    assert "the accuracy does not come from it" in text
    assert "adapter leaves 4.0%" in text
    headings = [heading.text() for heading in section.all("h3")]
    assert headings[0] == "By adapter: change of P(answer), points"
    assert headings[1].startswith("By ntk")


def test_features_that_carry_signed_forecasts(full: Report) -> None:
    scores, page, _ = full
    section = page.one("section", **{"aria-labelledby": "signed"})
    rows = rows_of(section.one("table", class_="feature-table"))
    domains = scores["signed"]["domains"]
    for cells, feature in zip(rows, scores["signed"]["top_features"], strict=True):
        j = feature["index"]
        parts = {
            name: top["contribution"]
            for name, found in domains.items()
            for top in found["top_features"]
            if top["index"] == j
        }
        largest = sorted(parts, key=lambda name: -abs(parts[name]))[:3]
        assert values_of(cells[1]) == [feature["share"]]
        assert values_of(cells[2]) == [parts[name] for name in largest]
        assert [bdi.text() for bdi in cells[2].all("bdi")] == largest
        assert cells[3].one("bdi").text() == feature["label"]
        assert cells[3].one("a").attrs["href"] == feature["neuronpedia"]
        assert [mark.text() for mark in cells[5].all("mark")] == ["␣carries"] * (5 if j < 3 else 0)
    carried = rows_of(section.one("table", id="table-carried"))
    for cells, (name, found) in zip(carried, domains.items(), strict=True):
        assert cells[0].text() == name
        assert values_of(cells[2]) == [found["share_of_top_features"]]
        up = [top["index"] for top in found["top_features"] if top["contribution"] > 0][:5]
        assert [int(link.text()) for link in cells[3].all("a")] == up


def test_signed_forecasts_of_long_answers_and_solved_sets_say_so(tmp_path: Path) -> None:
    scores = make_scores(5)
    scores["signed"] = make_signed(scores)
    found = list(scores["signed"]["domains"].values())
    found[1]["p_answer"] = 1e-9
    text = plain(page_of(tmp_path, scores).text())
    assert "The answers of domain 1 are too long or too unlikely" in text
    assert "domain 1 (answers too long)" in text
    for domain in found[1:4]:
        domain["p_answer"] = 1e-9
    scores["signed"]["train_loss"] = 0.002
    page = page_of(tmp_path, scores)
    text = plain(page.text())
    assert "Weak: the model answers the training set already" in text
    # Then the fall of the loss comes first, and the change of P behind a click.
    assert [heading.text() for heading in page.all("h3") if "adapter" in heading.text()] == [
        "By adapter: fall of the loss, nats per token"
    ]
    scores["signed"]["features"] = "raw"
    scores["signed"]["top_features"] = []
    for domain in found:
        domain["top_features"] = domain["share_of_top_features"] = None
    assert "there are no features to show" in plain(page_of(tmp_path, scores).text())
