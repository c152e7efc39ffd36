from __future__ import annotations

import copy
import itertools
import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny as tiny_material
from html_tree import Node, read_page
from scipy import stats
from written_run import (
    D_SAE,
    HOSTILE,
    TOP_N,
    make_ablation,
    make_importance,
    make_scores,
    make_signed,
    write_firings,
    write_full_run,
    write_scores,
    write_shift,
    write_validation,
)

import sts_fast
from sts_fast import InputError, files
from sts_fast.forecast.run import (
    COMPARISON_FILE,
    FEATURES_FILE,
    SHIFT_FILE,
    VALIDATION_FILE,
    validate_scores,
)
from sts_fast.report import build_comparison_report, build_report, figures, numbers
from sts_fast.report.outcome import outcome_section, outcome_warnings
from sts_fast.report.report import short_name


def rows_of(table: Node) -> list[list[Node]]:
    return [[cell for cell in row.children if isinstance(cell, Node)] for row in table.one("tbody").all("tr")]


def scores_by(scores: dict[str, Any], estimator: str) -> dict[str, Any]:
    return {domain["name"]: domain["scores"][estimator] for domain in scores["domains"]}


def values_of(cell: Node) -> list[float]:
    return [float(data.attrs["value"]) for data in cell.all("data")]


def plain(text: str) -> str:
    """Without the characters that keep a name's writing direction, and with single spaces."""
    return " ".join(re.sub("[\u2068\u2069]", "", text).split())


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Node, Path]:
    folder = tmp_path_factory.mktemp("full")
    scores = write_full_run(folder)
    validate_scores(scores)
    path = build_report(folder)
    assert path == folder / "report.html"
    return scores, read_page(path), path


def page_of(folder: Path, scores: dict[str, Any]) -> Node:
    return read_page(build_report(write_scores(folder, scores)))


# ---- numbers


@pytest.mark.parametrize("estimator", ["act", "icl", "act_sq"])
def test_ranking_holds_the_scores(full: tuple[dict[str, Any], Node, Path], estimator: str) -> None:
    scores, page, _ = full
    wanted = sorted(scores["domains"], key=lambda domain: -domain["scores"][estimator]["value"])
    rows = rows_of(page.one("table", id=f"table-{estimator}"))
    assert [cells[1].text() for cells in rows] == [domain["name"] for domain in wanted]
    for rank, (cells, domain, after) in enumerate(zip(rows, wanted, [*wanted[1:], None], strict=True), 1):
        assert cells[0].text() == str(rank)
        assert values_of(cells[2]) == [domain["scores"][estimator]["value"]]
        assert values_of(cells[3]) == domain["scores"][estimator]["ci"]
        assert values_of(cells[4]) == [domain["controls"]["random"][estimator]]
        assert cells[5].text() == str(domain["n_prompts"])
        clear = after and domain["scores"][estimator]["ci"][0] > after["scores"][estimator]["ci"][1]
        assert cells[6].text() == ("–" if after is None else "yes" if clear else "no")


@pytest.mark.parametrize("estimator", ["act", "icl", "act_sq"])
def test_bars_are_as_long_as_scores_are_large(full: tuple[dict[str, Any], Node, Path], estimator: str) -> None:
    scores, page, _ = full
    wanted = sorted(scores["domains"], key=lambda domain: -domain["scores"][estimator]["value"])
    svg = next(
        node for node in page.all("svg") if node.attrs["aria-labelledby"].startswith(f"ranking-{estimator}-0-title")
    )
    bars = svg.all("rect", class_="bar")
    widths = np.asarray([float(bar.attrs["width"].rstrip("%")) for bar in bars])
    assert all(bar.attrs["x"] == "0.00%" for bar in bars)
    unit = widths[0] / wanted[0]["scores"][estimator]["value"]
    assert widths == pytest.approx([unit * domain["scores"][estimator]["value"] for domain in wanted], abs=0.02)
    marks = [float(line.attrs["x1"].rstrip("%")) for line in svg.all("line", class_="control")]
    assert marks == pytest.approx([unit * domain["controls"]["random"][estimator] for domain in wanted], abs=0.02)
    ends = [
        (float(line.attrs["x1"].rstrip("%")), float(line.attrs["x2"].rstrip("%")))
        for line in svg.all("line", class_="whisker")
        if line.attrs["x1"] != line.attrs["x2"]
    ]
    assert np.asarray(ends) == pytest.approx(
        np.asarray([[unit * bound for bound in domain["scores"][estimator]["ci"]] for domain in wanted]), abs=0.02
    )
    ticks = {float(text.text().replace("−", "-")): text.attrs["x"] for text in svg.all("text", class_="tick")}
    assert all(float(x.rstrip("%")) == pytest.approx(unit * tick, abs=0.02) for tick, x in ticks.items())


@pytest.mark.parametrize("field", ["adapter", "adapter_loss", "ntk", "ntk_loss"])
def test_signed_bars_lie_on_their_side_of_zero(full: tuple[dict[str, Any], Node, Path], field: str) -> None:
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
    for bar, name in zip(svg.all("rect", class_="bar"), wanted, strict=True):
        left, width = (float(bar.attrs[key].rstrip("%")) for key in ("x", "width"))
        value = factor * found[name]["value"]
        assert ("falling" in bar.attrs["class"]) == (value < 0)
        assert [left, left + width] == pytest.approx(sorted([zero, zero + unit * value]), abs=0.02)
    assert [text.text() for text in svg.all("text", class_="axis")][::2] == ["← worse", "better →"]


def test_signed_section_in_plain_words(full: tuple[dict[str, Any], Node, Path]) -> None:
    scores, page, _ = full
    section = page.one("section", **{"aria-labelledby": "signed"})
    text = plain(section.text())
    values = {name: 100 * score["value"] for name, score in scores_by(scores, "adapter").items()}
    best, worst = max(values, key=lambda name: values[name]), min(values, key=lambda name: values[name])
    shown = {name: f"{values[name]:+.1f}".replace("-", "−") for name in (best, worst)}
    for name in (best, worst):
        low, high = scores_by(scores, "adapter")[name]["ci"]
        shown[name] += " points" + (", with zero inside its interval" if low <= 0 <= high else "")
    lead = plain(page.all("p", class_="lead")[1].text())
    assert lead == f"By adapter training improves {best} most ({shown[best]}) and harms {worst} most ({shown[worst]})."
    assert "the accuracy does not come from it" in text
    assert "adapter leaves 4.0%" in text
    headings = [heading.text() for heading in section.all("h3")]
    assert headings[0] == "By adapter: change of P(answer), points"
    assert headings[1].startswith("By ntk")


def test_features_that_carry_signed_forecasts(full: tuple[dict[str, Any], Node, Path]) -> None:
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


def test_features_zeroed_beside_random_ones(full: tuple[dict[str, Any], Node, Path], tmp_path: Path) -> None:
    scores, page, _ = full
    document = make_ablation(scores)
    section = page.one("section", **{"aria-labelledby": "ablation"})
    train, *domains = document["sets"]
    domains.sort(key=lambda one: one["conditions"]["top"]["p_answer"]["value"])
    rows = rows_of(section.one("table", id="table-ablation"))
    assert [cells[0].text() for cells in rows] == ["training set", *(one["name"] for one in domains)]
    for cells, one in zip(rows, [train, *domains], strict=True):
        top, like, random = (one["conditions"][name]["p_answer"] for name in ("top", "like_activity", "random"))
        assert values_of(cells[2]) == pytest.approx([100 * top["value"]])
        assert values_of(cells[3]) == pytest.approx([100 * bound for bound in top["ci"]])
        assert values_of(cells[4]) == pytest.approx([100 * like["value"]])
        assert values_of(cells[5]) == pytest.approx([100 * min(like["draws"]), 100 * max(like["draws"])])
        assert values_of(cells[6]) == pytest.approx([100 * random["value"]])
        assert values_of(cells[8]) == pytest.approx([100 * like["top_less_this"]["value"]])
        assert cells[10].text() == ("yes" if like["top_less_this"]["ci"][1] < 0 else "no")
    own = 100 * train["conditions"]["top"]["p_answer"]["value"]
    assert f"Zeroing the {TOP_N} features of D_N changes P(answer) on the training set by {own:+.1f}".replace(
        "-", "−"
    ) in plain(section.text())
    # An ablation of other features is none of this run, and one that is not whole is told.
    write_full_run(tmp_path, make_scores())
    document["features"]["top"] = [[D_SAE + 1]]
    (tmp_path / "ablation.json").write_text(json.dumps(document))
    page = read_page(build_report(tmp_path))
    assert "ablation.json belongs to another run" in page.one("section", class_="warnings").text()
    assert not page.all("section", **{"aria-labelledby": "ablation"})
    del document["sets"][0]["before"]["loss"]
    (tmp_path / "ablation.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"ablation\.json is not an ablation\.json"):
        build_report(tmp_path)


def test_summary_says_who_is_first_and_how_clearly(tmp_path: Path) -> None:
    scores = make_scores(5)
    for i, domain in enumerate(scores["domains"]):
        domain["scores"]["act"] = {"value": 5.0 - i, "ci": [4.6 - i, 5.4 - i]}
    lead = plain(page_of(tmp_path, scores).one("p", class_="lead").text())
    assert "a-model on maths/set.jsonl is forecast to move domain 0 most and domain 4 least of 5 domains" in lead
    assert "The first place is clear: its 95% interval lies above that of the next, domain 1." in lead
    for i in (1, 3):
        scores["domains"][i]["scores"]["act"]["ci"][1] = 4.7
    lead = plain(page_of(tmp_path, scores).one("p", class_="lead").text())
    assert "The first place is not settled: its 95% interval overlaps domain 1 and domain 3." in lead


def test_agreement_is_spearman(full: tuple[dict[str, Any], Node, Path]) -> None:
    scores, page, _ = full
    columns = {
        name: [domain["scores"][name]["value"] for domain in scores["domains"]] for name in ("act", "icl", "act_sq")
    }
    text = plain(page.text())
    for first, second in (("act", "icl"), ("act", "act_sq"), ("icl", "act_sq")):
        rho = stats.spearmanr(columns[first], columns[second]).statistic
        found = re.search(rf"STS_{first} and STS_{second} [^(]*\(Spearman ([−.\d]+) over 6 domains", text)
        assert found is not None
        assert found[1] == f"{rho:.2f}".replace("-", "−")


def test_controls_are_held_against_every_score(full: tuple[dict[str, Any], Node, Path]) -> None:
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


def test_every_number_of_every_control_is_shown(full: tuple[dict[str, Any], Node, Path]) -> None:
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


def test_concentration_curve(full: tuple[dict[str, Any], Node, Path]) -> None:
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
    write_shift(tmp_path, scores, kind="CorrelationStats")
    page = read_page(build_report(tmp_path))
    assert "How concentrated is the activity?" in page.text()
    assert "no shift was measured" in page.text()
    assert page.all("polyline")


def test_features_and_where_they_fire(full: tuple[dict[str, Any], Node, Path]) -> None:
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


def test_what_was_read(full: tuple[dict[str, Any], Node, Path]) -> None:
    scores, page, _ = full
    keys = ("prompts", "tokens", "pairs", "skipped", "too_long", "unanswered", "special", "sinks")
    rows = rows_of(page.one("table", id="table-read"))
    for cells, entry in zip(rows, [scores["train"], *scores["domains"]], strict=True):
        assert [cell.text() for cell in cells[1:]] == [f"{entry[f'n_{key}']:,}" for key in keys]


def test_provenance(full: tuple[dict[str, Any], Node, Path]) -> None:
    scores, page, _ = full
    rows = [[cell.text() for cell in cells] for cells in rows_of(page.one("table", id="table-inputs"))]
    assert rows == [list(entry.values()) for entry in scores["provenance"]["inputs"]]
    assert page.one("pre").text() == scores["provenance"]["command"]
    text = page.one("section", **{"aria-labelledby": "provenance"}).text()
    for value in ("seed 7", "0.0.test", "avx2", "act, icl, act_sq", "models/deep/a-model", "2026-01-02T03:04:05"):
        assert value in text


def test_warnings_come_first(full: tuple[dict[str, Any], Node, Path]) -> None:
    _, page, _ = full
    text = page.text()
    assert text.index("a warning of the run") < text.index("Ranking")


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        (
            lambda s: s["domains"][1]["controls"]["random"].update(act=99.0),
            "By STS_act, domain 1 does not stand out",
        ),
        (lambda s: s["domains"][0].update(n_skipped=1000), "could not be used in domain 0:"),
        (lambda s: s["train"].update(n_skipped=1000), "could not be used in the training set:"),
        (lambda s: s["shift"]["stability"].update(mean_overlap=0.3), "keeps only 30.0% of them"),
        (lambda s: s["domains"].__delitem__(slice(3, None)), "Only 3 domains: too few to judge"),
    ],
    ids=["random", "domain-skipped", "train-skipped", "unstable", "few"],
)
def test_numbers_that_warn(tmp_path: Path, change: Any, warning: str) -> None:
    scores = make_scores()
    assert not page_of(tmp_path, scores).all("section", class_="warnings")
    change(scores)
    assert warning in plain(page_of(tmp_path, scores).one("section", class_="warnings").text())


# ---- few, many, odd


@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_few_domains(tmp_path: Path, n: int) -> None:
    page = page_of(tmp_path, make_scores(n))
    text = plain(page.text())
    assert len(page.all("svg")) == (3 if n else 0)
    if n:
        assert f"STS_act and STS_icl agree cannot be judged: {numbers.counted(n, 'domain')}, and 4 are needed" in text
        assert "too few domains" in page.one("table", id="table-controls").text()
    if n == 1:
        assert "One score alone ranks nothing." in text
    if n == 0:
        assert "no domain was scored" in text


def test_many_domains_stand_behind_a_click(tmp_path: Path) -> None:
    page = page_of(tmp_path, make_scores(72))
    figure = page.all("figure")[0]
    assert len(figure.one("details").all("rect", class_="bar")) == 48
    assert len(figure.all("rect", class_="bar")) == 72
    assert len(rows_of(page.one("table", id="table-act"))) == 72


def test_one_estimator(tmp_path: Path) -> None:
    scores = make_scores()
    scores["settings"]["estimators"] = ["icl"]
    for domain in scores["domains"]:
        domain["scores"] = {"icl": domain["scores"]["icl"]}
    page = page_of(tmp_path, scores)
    assert [h3.text() for h3 in page.all("h3")] == ["By STS_icl"]
    assert "Only one estimator was computed" in page.text()


def test_scores_of_zero(tmp_path: Path) -> None:
    scores = make_scores()
    for domain in scores["domains"]:
        domain["scores"]["act"] = {"value": 0.0, "ci": [0.0, 0.0]}
        domain["controls"] = {"random": {"act": 0.0}}
    scores["shift"] |= {"share_of_top_n": 0.0, "n_features_shifted": 0}
    write_scores(tmp_path, scores)
    top = np.asarray([feature["index"] for feature in scores["shifted_features"]])
    arrays = {"sum_sq_shift": np.zeros(D_SAE), "shifted_features": top}
    files.save_arrays(tmp_path / SHIFT_FILE, arrays, {"kind": "ShiftStats"})
    page = read_page(build_report(tmp_path))
    assert {bar.attrs["width"] for bar in page.all("svg")[0].all("rect", class_="bar")} == {"0.00%"}
    assert "agree cannot be judged: one of them is the same for all domains" in page.text()
    assert not page.all("polyline")


# ---- outcome


def test_outcome_numbers(full: tuple[dict[str, Any], Node, Path]) -> None:
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
            (tmp_path / VALIDATION_FILE).write_text(json.dumps(broken))
            assert "Forecast against outcome" in read_page(build_report(tmp_path)).text()
    (tmp_path / VALIDATION_FILE).write_text("{}")
    assert "validation.json contains no comparison" in read_page(build_report(tmp_path)).text()


def test_files_of_another_run_are_named(tmp_path: Path) -> None:
    scores = write_full_run(tmp_path)
    scores["domains"][2]["scores"]["act"]["value"] += 0.01
    scores["shifted_features"].reverse()
    text = plain(page_of(tmp_path, scores).one("section", class_="warnings").text())
    assert "validation.json contains other scores than scores.json" in text
    assert "shift.safetensors belongs to another run than scores.json" in text


# ---- text from outside


def test_hostile_text_is_shown_as_text(tmp_path: Path) -> None:
    scores = make_scores(len(HOSTILE))
    for domain, name in zip(scores["domains"], HOSTILE, strict=True):
        domain["name"] = name
    bad = HOSTILE[0]
    scores["model"]["name"] = scores["sae"]["hook_name"] = HOSTILE[1]
    scores["sae"]["source"] = HOSTILE[3]
    scores["provenance"]["command"] = HOSTILE[4]
    scores["provenance"]["versions"][bad] = HOSTILE[1]
    scores["provenance"]["inputs"][0]["path"] = bad
    for feature, text in zip(scores["shifted_features"], HOSTILE, strict=False):
        feature |= {"promoted_tokens": [text], "label": text, "neuronpedia": "javascript:alert(1)"}
    scores["shifted_features"][0]["neuronpedia"] = 'https://x.org/"><script>'
    scores["domains"][0]["controls"][bad] = {HOSTILE[1]: 1.0}
    scores["warnings"] = HOSTILE
    scores["signed"] = make_signed(scores)
    for feature, text in zip(scores["signed"]["top_features"], HOSTILE, strict=False):
        feature |= {"promoted_tokens": [text], "label": text, "neuronpedia": "javascript:alert(1)"}
    write_scores(tmp_path, scores)
    write_firings(tmp_path, scores, text=HOSTILE[1])
    write_validation(tmp_path, scores)
    page = read_page(build_report(tmp_path))
    allowed = {
        "html", "head", "meta", "link", "title", "style", "body", "header", "main", "nav", "section", "h1", "h2", "h3",
        "p", "strong", "ul", "li", "a", "dl", "div", "dt", "dd", "details", "summary", "figure", "figcaption", "table",
        "caption", "thead", "tbody", "tr", "th", "td", "data", "bdi", "span", "code", "pre", "mark", "svg", "desc", "g",
        "sub",
        "rect", "line", "circle", "text", "polyline",
    }  # fmt: skip
    assert {node.tag for node in page.walk()} <= allowed
    for node in page.walk():
        assert not any(key.startswith("on") or key in ("style", "src") for key in node.attrs), node
        assert node.tag == "a" or "href" not in node.attrs or node.tag == "link"
    links = [node.attrs["href"] for node in page.all("a") if not node.attrs["href"].startswith("#")]
    assert links == ['https://x.org/"><script>', "https://arxiv.org/abs/2603.02908"]
    for cells in rows_of(page.one("table", id="table-act")):
        assert cells[1].text() in HOSTILE
    assert [li.text() for li in page.one("section", class_="warnings").all("li")][: len(HOSTILE)] == HOSTILE
    assert page.one("pre").text() == HOSTILE[4]
    assert len(page.all("title")[0].text()) < 300


def test_characters_that_html_cannot_hold(tmp_path: Path) -> None:
    scores = make_scores(5)
    scores["domains"][0]["name"] = "nul \0 bell \a half \ud800 lines\r\n and tabs\t"
    text = build_report(write_scores(tmp_path, scores)).read_text(encoding="utf-8")
    assert "nul ␀ bell ␇ half ? lines" in text
    assert "\0" not in text
    read_page(tmp_path / "report.html")


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" the", "␣the"),
        ("\n\n", "↵↵"),
        ("a\tb\r", "a⇥b␍"),
        ("\u00a0", "⍽"),
        ("", "(empty)"),
        ("\u200b", "U+200B"),
        ("\u200d\u2060", "U+200D U+2060"),
        ("e\u0301", "e\u0301"),
        ("数", "数"),
    ],
)
def test_tokens_are_made_visible(token: str, shown: str) -> None:
    assert numbers.visible_token(token) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"), (5.892992, "5.89"), (4.8, "4.80"), (100.0, "100"), (-0.25, "−0.250"), (1234.5, "1,234"),
        (1e-5, "1.00e−05"), (12345678.0, "1.23e+07"), (None, "–"),
    ],
)  # fmt: skip
def test_numbers_have_three_digits(value: float | None, shown: str) -> None:
    assert numbers.significant(value) == shown


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B"),
        ("models/deep/a-model/", "a-model"),
        ("./model", "model"),
        ("C:\\models\\mine", "mine"),
        ("gpt2", "gpt2"),
        ("/", "/"),
    ],
)
def test_short_names(name: str, shown: str) -> None:
    assert short_name(name) == shown


@pytest.mark.parametrize("seed", range(30))
def test_scales_cover_their_values_with_round_ticks(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = (rng.normal(size=rng.integers(1, 6)) * 10.0 ** rng.integers(-8, 9) + rng.integers(-3, 3)).tolist()
    scale = figures.Scale.over(values)
    assert scale.low <= min(values)
    assert scale.high >= max(values)
    assert 2 <= len(scale.ticks) <= 7
    assert np.diff(scale.ticks) == pytest.approx(scale.ticks[1] - scale.ticks[0])
    assert all(0 <= scale.at(value) <= 100 for value in values)


def test_names_are_cut_to_their_room() -> None:
    assert figures.shortened("short", 100) == "short"
    cut = figures.shortened("x" * 200, 100)
    assert cut.endswith("…")
    assert len(cut) * figures.CHARACTER <= 100
    assert len(figures.shortened("数" * 200, 100)) < len(cut)


# ---- the page


def test_the_page_needs_nothing_from_outside(full: tuple[dict[str, Any], Node, Path]) -> None:
    _, page, path = full
    for node in page.walk():
        for key, value in node.attrs.items():
            if re.search("https?:|//", value):
                assert (node.tag, key) == ("a", "href"), f"<{node.tag} {key}={value}>"
        assert node.tag not in ("script", "iframe", "object", "embed", "img", "image", "use", "base", "form")
    style = page.one("style").text()
    assert not re.search("@import|url\\(|https?:|expression", style)
    [policy] = [m for m in page.all("meta") if m.attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy.attrs["content"].startswith("default-src 'none'")
    assert path.stat().st_size < 1_000_000


def test_the_same_run_gives_the_same_bytes(full: tuple[dict[str, Any], Node, Path], tmp_path: Path) -> None:
    _, _, path = full
    before = path.read_bytes()
    copied = shutil.copytree(path.parent, tmp_path / "elsewhere")
    (copied / "report.html").unlink()
    assert build_report(str(copied)).read_bytes() == before
    assert build_report(copied).read_bytes() == before
    assert sorted(file.name for file in copied.iterdir()) == sorted(file.name for file in path.parent.iterdir())


def test_the_page_is_built_for_everyone(full: tuple[dict[str, Any], Node, Path]) -> None:
    _, page, _ = full
    assert page.one("html").attrs["lang"] == "en"
    ids = [node.attrs["id"] for node in page.walk() if "id" in node.attrs]
    assert len(ids) == len(set(ids))
    by_id = {node.attrs["id"]: node for node in page.walk() if "id" in node.attrs}
    outer = [node for node in page.all("svg") if "viewbox" not in node.attrs]
    assert len(outer) == 12
    for svg in outer:
        assert svg.attrs["role"] == "img"
        title, description = (by_id[name] for name in svg.attrs["aria-labelledby"].split())
        assert (title.tag, description.tag) == ("title", "desc")
        assert len(title.text()) > 10
        assert len(description.text()) > 20
    for table in page.all("table"):
        assert table.one("caption").text()
        assert all(th.attrs["scope"] in ("row", "col") for th in table.all("th"))
        assert table.all("th")
    for region in page.all("div", class_="scroll"):
        assert region.attrs["tabindex"] == "0"
        assert region.attrs["role"] == "region"
        assert region.attrs["aria-label"]
    levels = [int(node.tag[1]) for node in page.walk() if re.fullmatch("h[1-6]", node.tag)]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    for link in page.one("nav").all("a"):
        assert link.attrs["href"].removeprefix("#") in by_id
    for node in page.all("section"):
        assert by_id[node.attrs["aria-labelledby"]].tag == "h2"


def luminance(colour: str) -> float:
    """Relative luminance as in WCAG 2.1."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(full: tuple[dict[str, Any], Node, Path], scheme: str) -> None:
    style = full[1].one("style").text()
    light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)[:2]
    colours = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6});", light))
    if scheme == "dark":
        other = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6});", dark))
        assert other.keys() == colours.keys()
        colours = other
    for text, ground in (
        ("text", "page"), ("muted", "page"), ("accent", "page"), ("text", "panel"), ("muted", "panel"),
        ("warn-text", "warn-page"), ("mark-text", "mark-page"),
    ):  # fmt: skip
        assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    # What is drawn, rather than written, needs 3:1 against what it lies on.
    for drawn, ground in (
        ("accent", "page"), ("control", "page"), ("text", "bar"), ("muted", "page"),
    ):  # fmt: skip
        assert contrast(colours[drawn], colours[ground]) >= 3, (drawn, ground)
    # Every colour is one of these: no scheme is forgotten anywhere.
    rest = re.sub(r":root \{.*?\}", "", style, flags=re.DOTALL)
    assert not re.findall(r"#[0-9a-fA-F]{3,8}\b|rgba?\(|hsla?\(", rest)


# ---- what cannot be read


def with_scores(change: Any) -> Any:
    def write(folder: Path) -> None:
        scores = make_scores()
        change(scores)
        write_scores(folder, scores)

    return write


def with_file(name: str, content: bytes) -> Any:
    def write(folder: Path) -> None:
        write_scores(folder, make_scores())
        (folder / name).write_bytes(content)

    return write


def with_features(rows: list[dict[str, Any]]) -> Any:
    def write(folder: Path) -> None:
        write_scores(folder, make_scores())
        pq.write_table(pa.Table.from_pylist(rows), folder / FEATURES_FILE)

    return write


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda folder: folder.rmdir(), "there is no folder"),
        (lambda folder: None, "has no scores.json"),
        (with_file("scores.json", b""), "not readable JSON"),
        (with_file("scores.json", b"\xff\xfe"), "not readable JSON"),
        (with_file("scores.json", b"[" * 200_000), "not readable JSON"),
        (with_file("scores.json", b"[1]"), "not a JSON object"),
        (with_file("scores.json", b"{}"), "without a schema version"),
        (with_scores(lambda s: s.update(schema_version="2.0")), "schema version 2.0"),
        (with_scores(lambda s: s.update(schema_version=["x"])), "without a schema version"),
        (with_scores(lambda s: s.update(domains={})), "not a scores.json"),
        (with_scores(lambda s: s.pop("train")), "'train' is a required property"),
        (with_scores(lambda s: s["domains"][0]["scores"]["act"].update(value="5")), "not a scores.json: $.domains[0]"),
        (with_scores(lambda s: s["domains"][0].update(controls=5)), "not a scores.json: $.domains[0].controls"),
        (
            with_scores(lambda s: s["domains"][0]["controls"].update(x={"act": []})),
            "not a scores.json: $.domains[0]",
        ),
        (with_scores(lambda s: s["domains"][0]["scores"]["act"].update(value=math.nan)), "NaN"),
        (with_scores(lambda s: s["domains"][0]["scores"]["act"].update(value=10**200)), "beyond 1e100"),
        (with_file("shift.safetensors", b"junk"), "shift.safetensors"),
        (with_file("features.parquet", b"junk"), "features.parquet is not a readable parquet file"),
        (with_features([{"token": "x"}]), "features.parquet has no numbers"),
        (with_features([{"feature": "x", "rank": 1, "value": 1.0}]), "features.parquet has no numbers"),
        (with_file("validation.json", b"{"), "validation.json is not readable JSON"),
        (with_file("validation.json", b'{"size": Infinity}'), "validation.json is not readable JSON"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path: Path, write: Any, message: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    write(folder)
    with pytest.raises(InputError) as caught:
        build_report(folder)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert not (folder / "report.html").exists()


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    write_scores(tmp_path, make_scores())
    (tmp_path / "report.html").mkdir()
    with pytest.raises(InputError, match=r"cannot write .*report\.html"):
        build_report(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "scores.json"]


def test_later_minor_versions_may_add_keys(tmp_path: Path) -> None:
    scores = make_scores()
    scores["schema_version"] = "1.9"
    scores["new"] = {"a": 1}
    scores["domains"][0]["new"] = [1]
    page_of(tmp_path, scores)


# ---- a real forecast


def test_training_sets_side_by_side(tmp_path: Path) -> None:
    trains, domains = ["a set", 'b"><script>'], ["maths", HOSTILE[0], "law"]

    def found(factor: float) -> dict[str, Any]:
        values = {"a set": [0.4, -0.2, 0.01], trains[1]: [-0.4, 0.1, None]}
        return {
            name: {
                "value": [value and factor * value for value in of],
                "ci": [value and [factor * value - 0.1, factor * value + 0.1] for value in of],
            }
            for name, of in values.items()
        }

    scores = {name: {"value": [3.0, 1.0, 0.1], "ci": [[2.0, 4.0], [0.5, 1.5], [0.0, 0.2]]} for name in trains}
    document = {
        "trains": [{"name": name} for name in trains], "domains": domains,
        "scores": {"act": scores, "adapter": found(1.0), "ntk_loss": found(2.0)},
        "shared_features": [[1.0, 0.25], [0.25, 1.0]],
    }  # fmt: skip
    changes = {
        "a set": {"value": [0.2, -0.1, 0.0], "interval": [[0.1, 0.3], None, [-0.1, 0.1]]},
        trains[1]: {"value": [-0.2, 0.1, None], "interval": [[-0.3, -0.1], [0.0, 0.2], None]},
    }
    document["changes"] = {"unit": "accuracy", "signed": True, "level": 0.9, "trains": changes}
    (tmp_path / COMPARISON_FILE).write_text(json.dumps(document), encoding="utf-8")
    page = read_page(build_comparison_report(tmp_path))
    calibrated = rows_of(page.one("table", id="table-changes"))
    assert [[cell.text() for cell in cells[1:]] for cells in calibrated] == [
        ["+20.0[+10.0, +30.0]", "−20.0[−30.0, −10.0]"], ["−10.0no interval", "+10.0[+0.0, +20.0]"],
        ["+0.0[−10.0, +10.0]", "no answers"],
    ]  # fmt: skip
    assert "its 90% interval" in page.one("table", id="table-changes").text()
    assert [node.attrs["id"] for node in page.all("h2")] == ["changes", "adapter", "ntk_loss", "act", "shared"]
    rows = rows_of(page.one("table", id="table-adapter"))
    assert [cells[0].text() for cells in rows] == domains
    assert [[values_of(cell) for cell in cells[1:]] for cells in rows] == [
        [[pytest.approx(40)], [pytest.approx(-40)]], [[pytest.approx(-20)], [pytest.approx(10)]],
        [[pytest.approx(1)], []],
    ]  # fmt: skip
    assert [[cell.attrs["class"] for cell in cells[1:]] for cells in rows] == [
        ["num better3", "num worse3"], ["num worse2", "num better1"], ["num", "num muted"],
    ]  # fmt: skip
    assert rows[0][1].text() == "+40.030.0 to +50.0".replace("30.0", "+30.0")
    assert rows[2][2].text() == "no answers"
    sizes = rows_of(page.one("table", id="table-act"))
    assert [values_of(cells[1]) for cells in sizes] == [[3.0], [1.0], [0.1]]
    assert [cell.text() for cell in rows_of(page.one("table", id="table-shared"))[0][1:]] == ["100.0%", "25.0%"]
    links = [link.attrs["href"] for link in page.one("table", id="table-adapter").all("a")]
    assert links == ["a%20set/report.html", "b%22%3E%3Cscript%3E/report.html"]
    (tmp_path / COMPARISON_FILE).write_text("{}")
    with pytest.raises(InputError, match=r"compare\.json is not a readable"):
        build_comparison_report(tmp_path)


def test_report_of_a_real_forecast(tiny: tiny_material.Tiny, tmp_path: Path) -> None:
    forecast = sts_fast.score(
        model=tiny.model, sae=tiny.saes["jumprelu"], train=tiny.train, domains=tiny.domains, shots=1, domain_shots=1,
        top_n=20,
    )  # fmt: skip
    forecast.save(tmp_path)
    page = read_page(build_report(tmp_path))
    wanted = sorted(forecast.domains, key=lambda domain: -domain.scores["act"].value)
    rows = rows_of(page.one("table", id="table-act"))
    assert [values_of(cells[2]) for cells in rows] == [[domain.scores["act"].value] for domain in wanted]
    assert len(rows_of(page.all("table", class_="feature-table")[0])) == 20
    assert page.all("polyline")
    assert page.all("mark")
