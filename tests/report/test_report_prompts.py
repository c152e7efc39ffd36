"""What the report shows of prompts.parquet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from html_tree import Node, plain, read_page, values_of
from written_run import HOSTILE, make_scores, write_scores

from sts_fast import InputError
from sts_fast.forecast.run import PROMPTS_FILE
from sts_fast.report import build_report
from sts_fast.report.prompts import MOST_CHARACTERS, MOST_SETS


def row_of(domain: str, i: int, texts: list[str] | None, act_sum: float | None, **more: Any) -> dict[str, Any]:
    return {
        "stage": "score", "domain": domain, "id": f"q{i}", "question": "the question", "positions": [1, 2, 3],
        "paired": [2, 3], "texts": texts, "act_sum": act_sum, "icl_sum": None, "act_sq_sum": None,
        "parts": None if texts is None else [{"feature": 7, "sum": 3.0, "position": 2}],
    } | more  # fmt: skip


def sections(folder: Path, scores: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[Node, list[Node]]:
    """The page, and what it shows of each set."""
    write_scores(folder, scores)
    pq.write_table(pa.Table.from_pylist(rows), folder / PROMPTS_FILE)
    page = read_page(build_report(folder))
    return page, page.one("section", **{"aria-labelledby": "asked"}).all("details")


def test_prompts_with_the_tokens_that_were_read(tmp_path: Path) -> None:
    texts = ["<user>", "What", " is", " it", "?\n"]
    rows = [row_of("domain 1", 1, texts, 6.0), row_of("domain 1", 2, texts, 12.0), row_of("domain 1", 3, None, 6.0)]
    rows.insert(0, row_of("train", 0, texts, None, stage="shift", parts=None))
    _, (train, domain) = sections(tmp_path, make_scores(), rows)
    assert plain(train.one("summary").text()) == "the training set 1 of 200 prompts"
    assert plain(domain.one("summary").text()) == "domain 1 2 of 41 prompts"
    first, second = domain.all("li")
    text = first.one("p", class_="prompt")
    assert text.text() == "<user>What␣is it? ↵ "
    assert [span.text() for span in text.all("span", class_="unread")] == ["<user>", "? ↵ "]
    assert [mark.text() for mark in text.all("mark")] == ["␣is"]
    # Of 24 over three prompts, one that is not shown among them; each has three tokens.
    assert values_of(first) == [4.0, 0.5]
    assert values_of(second) == [2.0, 0.25]
    assert plain(first.text()).endswith(
        "q2 · 3 tokens read · STS_act 4.00 · 50.0% of the domain’s sum · features 7 (25.0% at ␣is)"
    )
    assert not train.all("mark")
    assert not values_of(train)


def test_without_a_tokenizer_the_question_is_shown(tmp_path: Path) -> None:
    rows = [row_of("domain 1", 1, None, 6.0, parts=[{"feature": 7, "sum": 3.0, "position": 2}])]
    _, [domain] = sections(tmp_path, make_scores(), rows)
    assert plain(domain.one("p", class_="prompt").text()) == "the question"
    assert "features 7 (50.0%)" in plain(domain.text())


def test_the_page_stays_small(tmp_path: Path) -> None:
    n = 80
    rows = [row_of(f"domain {i}", k, ["", *["word "] * 300], 6.0) for i in range(n) for k in range(3)]
    page, shown = sections(tmp_path, make_scores(n), rows)
    assert len(shown) == MOST_SETS
    assert f"{n - MOST_SETS} further sets are in prompts.parquet" in plain(page.text())
    for prompt in (prompt for of_set in shown for prompt in of_set.all("p", class_="prompt")):
        text = prompt.text()
        assert text.startswith("…")
        assert text.endswith("…")
        assert len(text) == MOST_CHARACTERS + 2
    assert (tmp_path / "report.html").stat().st_size < 1_000_000


def test_hostile_prompts_are_text(tmp_path: Path) -> None:
    rows = [row_of(f"domain {i % 6}", i, ["", text, text, "\0", text], 6.0, id=text) for i, text in enumerate(HOSTILE)]
    page, _ = sections(tmp_path, make_scores(), rows)
    assert not {"script", "img"} & {node.tag for node in page.walk()}
    assert all(svg.attrs.get("onload") is None for svg in page.all("svg"))


@pytest.mark.parametrize("content", [b"junk", None])
def test_a_damaged_file_is_told(tmp_path: Path, content: bytes | None) -> None:
    write_scores(tmp_path, make_scores())
    if content is None:
        pq.write_table(pa.Table.from_pylist([{"stage": "score"}]), tmp_path / PROMPTS_FILE)
    else:
        (tmp_path / PROMPTS_FILE).write_bytes(content)
    with pytest.raises(InputError, match=r"prompts\.parquet .*make the run again"):
        build_report(tmp_path)
