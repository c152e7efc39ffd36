"""The page of a library, read as HTML, against the scores of its sets."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from html_tree import read_page
from tiny import Tiny

import sts_fast
from sts_fast.cli import main
from sts_fast.errors import InputError
from sts_fast.report import build_library_report
from sts_fast.report.numbers import significant


@pytest.fixture(scope="module")
def library(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page") / "lib"
    sts_fast.profile(
        model=tiny.model, sae=tiny.saes["topk"], library=folder, domains=tiny.domains,
        trains={"sums": tiny.train, "<b>days</b>": tiny.domains["days"]}, shots=1, domain_shots=2, limit=12,
    )  # fmt: skip
    return folder


def test_cells_are_the_scores_and_lead_to_what_carries_them(
    library: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["sts-fast", "report", str(library)])
    main()
    path = Path("".join(capsys.readouterr().out.split()))
    page = path.read_text()
    assert path == library / "report.html"
    assert "<script" not in page
    assert "<b>days</b>" not in page
    assert "&lt;b&gt;days&lt;/b&gt;" in page
    forecasts = sts_fast.compare_stored(library, ["sums", "<b>days</b>"])
    grid = read_page(path).one("div", class_="library")
    head, *rows = grid.all("div", role="row")
    domains = [cell.one("bdi").text() for cell in head.all("div", role="columnheader")[1:]]
    assert len(rows) == 2
    for k, domain in enumerate(domains):
        order = {}
        for row in rows:
            name = row.one("div", role="rowheader").one("bdi").text()
            score = next(of for of in forecasts[name].domains if of.name == domain).scores["act"]
            cell = row.all("div", role="cell")[k]
            low, high = map(significant, score.ci)
            assert cell.one("a").text() == significant(score.value)
            assert cell.one("span", class_="muted").text() == f"{low} to {high}"
            assert page.count(f'id="{cell.one("a").attrs["href"][1:]}"') == 1
            order[score.value] = int(re.findall(rf"--d{k}:(\d+);", row.attrs["style"])[0])
        assert sorted(order, key=order.__getitem__) == sorted(order, reverse=True)
    # The set that is one of the domains is marked there alone.
    assert len(re.findall(r"⚠ 12</span>", page)) == 1


def test_what_carries_a_score_is_its_largest_part(library: Path) -> None:
    page = build_library_report(library, top_n=4).read_text()
    profiles = {(p.identity.kind, p.name): p for p in map(sts_fast.Profile.load, sts_fast.Library(library))}
    train, domain = profiles["train", "sums"], profiles["domain", "spelling"]
    top = sorted(range(train.rows.d_sae), key=lambda j: (-train.mean_squared_shift()[j], j))[:4]
    parts = {j: domain.mean_activation()[j] for j in top if domain.mean_activation()[j] > 0}
    expected = [f"{j} ({parts[j] / sum(parts.values()):.0%})" for j in sorted(parts, key=lambda j: (-parts[j], j))]
    of_sums = page[page.index("<summary><bdi>sums</bdi>") :]
    shown = re.search(r"<dt><bdi>spelling</bdi>.*?<dd>(.*?)\n", of_sums, re.DOTALL)
    assert shown is not None
    assert [part.split(" ")[0] for part in shown[1].split(", ")] == [part.split(" ")[0] for part in expected]


def test_a_library_without_domains(tiny: Tiny, tmp_path: Path) -> None:
    sts_fast.profile(
        model=tiny.model, sae=tiny.saes["topk"], library=tmp_path, trains={"sums": tiny.train}, shots=1, limit=12
    )
    with pytest.raises(InputError, match="has no domain: add some with sts-fast profile"):
        build_library_report(tmp_path)
