"""The card of a run, read by the hub's own parser."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from written_run import HOSTILE, make_scores, write_scores

from sts_fast.cli import main
from sts_fast.errors import InputError
from sts_fast.report.card import write_card


def card_of(folder: Path, scores: dict[str, Any]) -> ModelCard:
    return ModelCard.load(write_card(write_scores(folder / "run", scores)))


def rows_of(text: str) -> list[list[str]]:
    """The table's cells: a sign behind a backslash is none of its lines."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_the_head_names_what_is_on_the_hub(tmp_path: Path) -> None:
    scores = make_scores(3)
    local = card_of(tmp_path / "local", scores)
    assert local.data.to_dict() == {
        "library_name": "sts-fast",
        "tags": ["sparse-autoencoder", "transferability", "forecast"],
    }
    scores["model"] |= {"name": "acme/model", "revision": "0" * 40}
    [entry] = [entry for entry in scores["provenance"]["inputs"] if entry["role"] == "train"]
    entry["path"] = f"acme/quiz:main:train@{'1' * 40}"
    data = card_of(tmp_path / "hub", scores).data
    assert (data.base_model, data.datasets) == ("acme/model", ["acme/quiz"])


def test_the_table_has_every_score_with_its_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = make_scores(2)
    first, second = scores["domains"]
    first["scores"] = {"act": {"value": 1.5, "ci": [1.25, 1.75]}, "trial": {"value": 0.0125, "ci": [-0.01, 0.03]}}
    second["scores"] = {"act": {"value": 2.5, "ci": [2.25, 2.75]}, "trial": {"value": 0.25, "ci": [0.2, 0.3]}}
    first["name"], second["name"] = "law | order", "math"
    folder = write_scores(tmp_path / "run", scores)
    monkeypatch.setattr("sys.argv", ["sts-fast", "report", str(folder), "--card"])
    main()
    assert f"The card is {folder / 'README.md'}" in capsys.readouterr().err
    text = ModelCard.load(folder / "README.md").text
    assert rows_of(text) == [
        ["domain", "trial [95%]", "STS_act [95%]", "prompts"],
        ["---"] * 4,
        ["math", "+25.0 [+20.0, +30.0]", "2.5 [2.25, 2.75]", "41"],
        [r"law \| order", "+1.2 [-1.0, +3.0]", "1.5 [1.25, 1.75]", "40"],
    ]
    for part in (
        "**trial** (points): ", "sts-fast score --train set.jsonl", "Seed 7", "`" + "ab" * 32 + "`", "## Limits",
        "Only 2 domains: too few",
    ):  # fmt: skip
        assert part in text
    assert "data/maths" not in text  # folders of the machine are nobody's business, the command aside


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    scores = make_scores(len(HOSTILE))
    for domain, name in zip(scores["domains"], HOSTILE, strict=True):
        domain["name"] = name + "\n---\n| x | y |"
    scores["provenance"]["command"] = "sts-fast score --train ```x"
    card = card_of(tmp_path, scores)
    rows = rows_of(card.text)
    assert len(rows) == len(HOSTILE) + 2
    assert {len(row) for row in rows} == {len(rows[0])}
    outside = card.text.partition("## How to make it again")[0]
    assert not re.search(r"(?<!\\)<(?!\w+\\>)", outside)
    assert "````bash\nsts-fast score --train ```x\n````" in card.text


def test_a_run_without_domains_has_a_card(tmp_path: Path) -> None:
    assert "No domain was scored." in card_of(tmp_path, make_scores(0)).text
    with pytest.raises(InputError):
        write_card(tmp_path)
