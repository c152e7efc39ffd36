from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from html_tree import read_page, rows_of, values_of
from written_run import HOSTILE

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
    (tmp_path / COMPARISON_FILE).write_text("{}")
    with pytest.raises(InputError, match=r"compare\.json is not a readable"):
        build_comparison_report(tmp_path)
