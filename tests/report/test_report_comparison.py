from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from html_tree import plain, read_page, rows_of, values_of
from written_run import HOSTILE, make_scores, write_scores, write_validation

from sts_fast import InputError
from sts_fast.forecast.run import COMPARISON_FILE
from sts_fast.report import build_comparison_report


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
    # The best and the worst in the mean over the domains that both forecast, of one unit.
    conclusions = [plain(lead.text()) for lead in page.all("p", class_="lead")]
    assert conclusions[0] == (
        "Over 2 domains, a set has the best forecast by adapter (+10.0 points in the mean, 1 better and 1 worse with "
        f"the whole interval), {trains[1]} the worst (−15.0 points in the mean, 0 better and 1 worse with the whole "
        "interval)."
    )
    assert conclusions[1:] == ["By STS_act, every training set would move maths most."]
    (tmp_path / COMPARISON_FILE).write_text("{}")
    with pytest.raises(InputError, match=r"compare\.json is not a readable"):
        build_comparison_report(tmp_path)


def sizes_of(columns: dict[str, list[float]]) -> dict[str, Any]:
    return {
        "trains": [{"name": name} for name in columns], "domains": [f"domain {i}" for i in range(5)],
        "scores": {
            "act": {
                name: {"value": values, "ci": [[value - 0.1, value + 0.1] for value in values]}
                for name, values in columns.items()
            }
        },
        "changes": None, "shared_features": [[1.0] * len(columns)] * len(columns),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ([10, 20, 30, 50, 40], "All put the domains in nearly the same order (Spearman 0.90)"),
        ([50, 10, 20, 30, 40], "Each puts the domains in an order of its own (Spearman 0.00)"),
        ([20, 10, 50, 30, 40], "Their orders of the domains are alike in part (Spearman 0.60)"),
    ],
)
def test_sizes_are_compared_within_a_training_set_alone(tmp_path: Path, other: list[float], words: str) -> None:
    first = [1.0, 2.0, 3.0, 4.0, 5.0]
    (tmp_path / COMPARISON_FILE).write_text(json.dumps(sizes_of({"small": first, "large": other})))
    page = read_page(build_comparison_report(tmp_path))
    lead = " ".join(plain(lead.text()) for lead in page.all("p", class_="lead"))
    most = max(range(5), key=lambda i: other[i])
    if most == 4:
        assert "every training set would move domain 4 most" in lead
    else:
        assert f"By STS_act, small would move domain 4 most, large would move domain {most} most." in lead
    assert words in lead
    rows = rows_of(page.one("table", id="table-act"))
    shades = {name: [cells[k].attrs["class"] for cells in rows] for k, name in enumerate(("small", "large"), 1)}
    # The same depths, though one has ten times the numbers of the other.
    assert shades["small"] == ["num", "num size1", "num size2", "num size3", "num size3"]
    assert shades["large"] == [shades["small"][round(value / 10) - 1] for value in other]


def test_outcomes_stand_beside_the_comparison(tmp_path: Path) -> None:
    document = sizes_of({"done": [1.0, 2, 3, 4, 5], "open": [1.0, 2, 3, 4, 5], "old": [1.0, 2, 3, 4, 5]})
    (tmp_path / COMPARISON_FILE).write_text(json.dumps(document))
    for name in ("done", "old"):
        write_scores(tmp_path / name, make_scores())
        validation = write_validation(tmp_path / name, make_scores())
    write_scores(tmp_path / "old", make_scores(7))  # another run than that of the outcome
    page = read_page(build_comparison_report(tmp_path))
    [figure] = page.one("section", **{"aria-labelledby": "outcomes"}).all("figure")
    r = validation["size"]["pearson"]["value"]
    assert plain(figure.one("figcaption").text()) == f"done r = {r:.2f}".replace("-", "−")
    assert len(figure.all("circle")) == 6
