from __future__ import annotations

import json
from pathlib import Path

import pytest
from html_tree import plain, read_page, rows_of, values_of
from written_run import TOP_N, Report, make_ablation, make_scores, write_full_run

from sts_fast import InputError
from sts_fast.forecast.run import save_beside
from sts_fast.report import build_report


def test_features_zeroed_beside_random_ones(full: Report, tmp_path: Path) -> None:
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
    # That of another run is left out, and one that is not whole is told.
    write_full_run(tmp_path, make_scores())
    (tmp_path / "ablation.json").write_text(json.dumps(document))
    page = read_page(build_report(tmp_path))
    assert "ablation.json belongs to another run" in page.one("section", class_="warnings").text()
    assert not page.all("section", **{"aria-labelledby": "ablation"})
    del document["sets"][0]["before"]["loss"]
    save_beside(tmp_path, "ablation.json", document)
    with pytest.raises(InputError, match=r"ablation\.json is not an ablation\.json"):
        build_report(tmp_path)
