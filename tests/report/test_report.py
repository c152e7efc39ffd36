from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny as tiny_material
from html_tree import read_page, rows_of, values_of
from written_run import Report, make_scores, write_scores

import sts_fast
from sts_fast import InputError
from sts_fast.report import build_report
from sts_fast.report.report import short_name


def test_what_was_read(full: Report) -> None:
    scores, page, _ = full
    keys = ("prompts", "tokens", "pairs", "skipped", "too_long", "unanswered", "special", "sinks")
    rows = rows_of(page.one("table", id="table-read"))
    for cells, entry in zip(rows, [scores["train"], *scores["domains"]], strict=True):
        assert [cell.text() for cell in cells[1:]] == [f"{entry[f'n_{key}']:,}" for key in keys]


def test_provenance(full: Report) -> None:
    scores, page, _ = full
    rows = [[cell.text() for cell in cells] for cells in rows_of(page.one("table", id="table-inputs"))]
    assert rows == [list(entry.values()) for entry in scores["provenance"]["inputs"]]
    assert page.one("pre").text() == scores["provenance"]["command"]
    text = page.one("section", **{"aria-labelledby": "provenance"}).text()
    for value in ("seed 7", "0.0.test", "avx2", "act, icl, act_sq", "models/deep/a-model", "2026-01-02T03:04:05"):
        assert value in text


def test_warnings_come_first(full: Report) -> None:
    _, page, _ = full
    text = page.text()
    assert text.index("a warning of the run") < text.index("Ranking")


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


def test_the_same_run_gives_the_same_bytes(full: Report, tmp_path: Path) -> None:
    _, _, path = full
    before = path.read_bytes()
    copied = shutil.copytree(path.parent, tmp_path / "elsewhere")
    (copied / "report.html").unlink()
    assert build_report(str(copied)).read_bytes() == before
    assert build_report(copied).read_bytes() == before
    assert sorted(file.name for file in copied.iterdir()) == sorted(file.name for file in path.parent.iterdir())


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    write_scores(tmp_path, make_scores())
    (tmp_path / "report.html").mkdir()
    with pytest.raises(InputError, match=r"cannot write .*report\.html"):
        build_report(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "scores.json"]


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
