from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from html_tree import plain, read_page, rows_of, values_of
from scipy import stats
from written_run import D_SAE, Report, make_means, make_scores, page_of, write_full_run, write_scores

from sts_fast.forecast.estimators import BY_NAME
from sts_fast.forecast.run import SHIFT_FILE
from sts_fast.forecast.stability import SETTLED, shift_line
from sts_fast.report import build_report, numbers


@pytest.mark.parametrize("estimator", ["act", "icl", "act_sq"])
def test_ranking_holds_the_scores(full: Report, estimator: str) -> None:
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
def test_dots_lie_at_their_scores(full: Report, estimator: str) -> None:
    scores, page, _ = full
    wanted = sorted(scores["domains"], key=lambda domain: -domain["scores"][estimator]["value"])
    svg = next(
        node
        for node in page.all("svg", role="img")
        if node.attrs["aria-labelledby"].startswith(f"ranking-{estimator}-0-title")
    )
    ticks = {
        float(text.text().replace("−", "-")): float(text.attrs["x"].rstrip("%")) for text in svg.all(class_="tick")
    }
    (first, at_first), *_, (last, at_last) = ticks.items()
    assert (at_first, at_last) == (0, 100)

    def at(value: float) -> float:
        return 100 * (value - first) / (last - first)

    assert list(ticks.values()) == pytest.approx([at(tick) for tick in ticks], abs=0.02)
    dots = [float(dot.attrs["cx"].rstrip("%")) for dot in svg.all("circle")]
    assert dots == pytest.approx([at(domain["scores"][estimator]["value"]) for domain in wanted], abs=0.02)
    marks = [float(line.attrs["x1"].rstrip("%")) for line in svg.all("line", class_="control")]
    randoms = [domain["controls"]["random"][estimator] for domain in wanted]
    assert marks == pytest.approx([at(value) for value in randoms if first <= value <= last], abs=0.02)
    ends = [
        (float(line.attrs["x1"].rstrip("%")), float(line.attrs["x2"].rstrip("%")))
        for line in svg.all("line", class_="whisker")
        if line.attrs["x1"] != line.attrs["x2"]
    ]
    assert np.asarray(ends) == pytest.approx(
        np.asarray([[at(bound) for bound in domain["scores"][estimator]["ci"]] for domain in wanted]), abs=0.02
    )
    assert [text.text() for text in svg.all("text", class_="axis")] == [f"{BY_NAME[estimator].axis} →"]


def test_what_matters_most_is_warned_of_first(tmp_path: Path) -> None:
    scores = write_full_run(tmp_path)
    scores["warnings"] = ["a warning of the run", "the SAE is another model's"]
    scores["sae"]["fit"]["warning"] = "the SAE is another model's"
    scores["train"]["n_skipped"] = 1000
    scores["domains"][1]["controls"]["random"]["act"] = 99.0
    warned = page_of(tmp_path, scores).one("section", class_="warnings").all("li")
    starts = [
        "the SAE is another model's", "More than half of the examples", "By STS_act, domain 1 does not stand out",
        "a warning of the run",
    ]  # fmt: skip
    assert [plain(item.text())[:20] for item in warned[:4]] == [start[:20] for start in starts]
    assert all("belongs to another run" in item.text() for item in warned[4:])


@pytest.mark.parametrize(
    ("kept", "words"), [(SETTLED, "is settled:"), (0.85, "is settled for the most part:"), (0.4, "is not settled:")]
)
def test_the_page_calls_features_settled_where_the_terminal_does(tmp_path: Path, kept: float, words: str) -> None:
    scores = make_scores()
    scores["shift"]["stability"]["mean_overlap"] = kept
    assert f"D_N {words}" in plain(page_of(tmp_path, scores).text())
    assert ("settled (90% kept)" in shift_line("train", 32, 100, kept)) == (words == "is settled:")


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


def test_agreement_is_spearman(full: Report) -> None:
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


@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_few_domains(tmp_path: Path, n: int) -> None:
    page = page_of(tmp_path, make_scores(n))
    text = plain(page.text())
    assert len(page.all("svg", role="img")) == (3 if n else 0)
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
    assert len(figure.one("details").all("circle")) == 48
    assert len(figure.all("circle")) == 72
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
    make_means(np.zeros(D_SAE)).save(tmp_path / SHIFT_FILE, {"shifted_features": top})
    page = read_page(build_report(tmp_path))
    assert {dot.attrs["cx"] for dot in page.all("svg", role="img")[0].all("circle")} == {"50.00%"}
    assert "agree cannot be judged: one of them is the same for all domains" in page.text()
    assert not page.all("polyline")
