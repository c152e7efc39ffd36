"""Tables of domains: what is shown where there is room, and what is named where there is none."""

from __future__ import annotations

import re

import pytest
from rich.console import Console

from sts_fast.cli import domain_table
from sts_fast.cli.domain_table import Column, print_domains
from sts_fast.forecast.estimators import BY_NAME

SIZES = {"law": (4.0, (3.0, 5.0)), "art": (2.0, (1.0, 3.0))}
CHANGES = {"law": (-0.25, (-0.5, -0.125)), "music": (0.5, (0.25, 0.75))}


def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int, **options: object) -> str:
    monkeypatch.setattr(domain_table, "out", Console(width=width))
    act = Column.of(BY_NAME["act"], SIZES)
    groups = [[act], [Column.of(BY_NAME["adapter"], CHANGES)], [Column.of(BY_NAME["icl"], SIZES)]]
    print_domains("Sizes", ["law", "art", "music"], groups, **options)
    return capsys.readouterr().out


def cells(text: str, name: str) -> list[str]:
    [row] = [row for row in text.splitlines() if re.match(rf"│ {name} ", row)]
    return [cell.strip() for cell in row.strip("│").split("│")]


def test_with_room_every_number_has_its_interval(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(monkeypatch, capsys, 120, bars="one", random={"law": 0.5, "art": 0.25, "music": 0.125})
    assert cells(text, "law") == ["law", "█" * 12, "4 [3, 5]", "0.5", "-25.0 [-50.0, -12.5]", "4 [3, 5]"]
    assert cells(text, "art") == ["art", "█" * 6, "2 [1, 3]", "0.25", "no answers", "2 [1, 3]"]
    assert cells(text, "music")[2:5] == ["no answers", "0.125", "+50.0 [+25.0, +75.0]"]
    assert "want of room" not in text


@pytest.mark.parametrize(
    ("width", "law", "left_out"),
    [
        (68, ["law", "█" * 12, "4 [3, 5]", "-25.0", "4"], ""),
        (46, ["law", "█" * 12, "4 [3, 5]"], "adapter, points; STS_icl"),
    ],
)
def test_with_less_room_the_first_column_keeps_its_interval(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int, law: list[str], left_out: str
) -> None:
    text = printed(monkeypatch, capsys, width, bars="one")
    assert cells(text, "law") == law
    assert max(map(len, text.splitlines())) <= width
    said = " ".join(text.split())
    assert (f"For want of room not shown: {left_out}." in said) == bool(left_out)


def test_bars_of_numbers_with_a_sign_go_both_ways(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(domain_table, "out", Console(width=80))
    print_domains("Changes", ["music", "law"], [[Column.of(BY_NAME["adapter"], CHANGES)]], bars="both")
    text = capsys.readouterr().out
    assert cells(text, "law") == ["law", "█" * 4, "", "-25.0 [-50.0, -12.5]"]
    assert cells(text, "music") == ["music", "", "█" * 8, "+50.0 [+25.0, +75.0]"]
