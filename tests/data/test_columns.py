"""Rows without an example: skipped, counted and said, with the columns that the others were read from."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sts_fast.data.columns import ReadColumns, ReadRows, canonical, reading_lines, row_blocks, row_warnings
from sts_fast.data.examples import load_domains, load_examples, read_domains, read_examples
from sts_fast.data.sources import origin_of
from sts_fast.errors import InputError

ROW = {"question": "q", "answer": "a"}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


BROKEN: dict[str, tuple[Any, str]] = {
    "null": (None, "nothing instead of named fields"),
    "list": ([1], "a list instead of named fields"),
    "text": ("q", "a text instead of named fields"),
    "no values": ({"question": None, "answer": ""}, "no question in 'question'"),
    "no question": ({"answer": "a"}, "no question in 'question'"),
    "blank question": ({"question": " \n"}, "no question in 'question'"),
    "NaN": ({"question": float("nan")}, "no question in 'question'"),
    "number": ({"question": 3}, "a number in 'question'"),
    "half a character": ({"question": "\ud800"}, "half a character (a lone surrogate) in 'question'"),
    "answer of an unknown structure": ({"question": "q", "answer": {"x": {}}}, "an object in 'answer'"),
}


@pytest.mark.parametrize(("row", "reason"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_row_is_left_out_and_counted(tmp_path: Path, row: Any, reason: str) -> None:
    path = write(tmp_path / "a.jsonl", ROW, row, ROW)
    examples, rows = read_examples(origin_of(path, "train", "train"))
    assert [example.id for example in examples] == ["1", "3"]
    assert (rows.n_rows, rows.left_out) == (3, {reason: 1})
    with pytest.warns(UserWarning, match=r"1 of the 3 rows of '.*a.jsonl' were left out: 1 with "):
        assert load_examples(path) == examples
    with pytest.raises(InputError) as caught:
        load_examples(path, strict=True)
    assert str(caught.value).startswith(f"{path}: row 2 has {reason}; ")


@pytest.mark.parametrize("row", [None, {}, {"question": None, "answer": ""}, {"messages": []}, "text"])
def test_a_broken_first_row_decides_nothing(tmp_path: Path, row: Any) -> None:
    examples, rows = read_examples(origin_of(write(tmp_path / "a.jsonl", row, ROW), "train", "train"))
    assert ([example.id for example in examples], rows.n_left_out) == (["2"], 1)


def test_a_set_of_broken_rows_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", None, {"question": ""}, {})
    with pytest.raises(InputError, match=r"has no usable row among 3: .*a\.jsonl: row 1 has nothing instead of"):
        load_examples(path)


def test_a_broken_conversation_is_left_out(tmp_path: Path) -> None:
    good = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    broken: list[Any] = [good[1:], None, [], [good[0], "?"], [{"role": "user", "content": " "}]]
    path = write(tmp_path / "a.jsonl", *({"messages": turns} for turns in (*broken, good)))
    _, rows = read_examples(origin_of(path, "train", "train"))
    assert rows.left_out == {
        "no turn of the user": 1,
        "no question in 'messages'": 2,
        "a turn that is a text": 1,
        "an empty question": 1,
    }


def test_domains_of_one_file_share_what_was_left_out(tmp_path: Path) -> None:
    rows = [ROW | {"category": category} for category in ("law", "art", None, "law")]
    path = write(tmp_path / "a.jsonl", *rows, None)
    domains = read_domains([str(path)], {}, {})
    assert {name: len(examples) for name, (examples, _) in domains.items()} == {"law": 2, "art": 1}
    read = [(name, rows) for name, (_, rows) in domains.items()]
    assert row_warnings(read) == [
        "2 of the 5 rows of 'law, art' were left out: 1 with no category, 1 with nothing instead of named fields"
    ]
    with pytest.warns(UserWarning, match="2 of the 5 rows of 'law, art'") as caught:
        load_domains([str(path)])
    assert len(caught) == 1


def rows_of(n: int, n_left_out: int = 0, **columns: Any) -> ReadRows:
    rows = ReadRows(columns=ReadColumns({"question": ["q"], **columns}, ["title"]), n_rows=n)
    rows.left_out.update({"no question": n_left_out} if n_left_out else {})
    return rows


def test_sets_that_are_read_alike_are_said_in_one_line() -> None:
    alike = [(f"s{i}", rows_of(1000, n_left_out=i == 3)) for i in range(58)]
    other = rows_of(10, answer=["a"])
    other.n_bad = 2
    assert reading_lines([("train", other), *alike]) == [
        "train: question from q, answer from a; not read: title; 10 rows, 2 replies labelled bad",
        "s0, s1, s2, s3 and 54 more: question from q; not read: title; 58,000 rows, 1 left out: 1 with no question",
    ]


def test_a_large_share_left_out_is_a_warning() -> None:
    assert row_warnings([("a", rows_of(100, 10))]) == []
    assert row_warnings([("a", rows_of(100, 11))]) == ["11 of the 100 rows of 'a' were left out: 11 with no question"]
    rows = rows_of(100)
    rows.left_out.update({f"reason {i}": 20 - i for i in range(5)})
    assert row_warnings([("a", rows)]) == [
        "90 of the 100 rows of 'a' were left out: 20 with reason 0, 19 with reason 1, 18 with reason 2, 33 more"
    ]


def test_block_of_each_source() -> None:
    rows = rows_of(5, 1)
    assert row_blocks([("a", rows), ("b", rows)]) == [
        {
            "sets": ["a", "b"],
            "columns": {"question": ["q"]},
            "unread": ["title"],
            "n_rows": 5,
            "left_out": {"no question": 1},
            "n_bad": 0,
            "notes": [],
        }
    ]


@pytest.mark.parametrize("name", ["Correct Answer", "correct_answer", " CORRECT-ANSWER "])
def test_canonical_names(name: str) -> None:
    assert canonical(name) == "correct_answer"


def test_column_without_a_name_is_not_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",question,answer\n0,q,a\n")  # as pandas writes the numbers of rows
    assert read_examples(origin_of(tmp_path / "a.csv", "train", "train"))[1].columns.unread == []


def test_field_of_an_object_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"question": {"tokens": ["Q"], "text": "Q"}, "answer": "a"})  # NarrativeQA
    with pytest.raises(
        InputError, match=r"an object in 'question'; name a column .*--question-field, as question\.text"
    ):
        load_examples(path)
    assert load_examples(path, question_field="question.text")[0].question == "Q"


def test_what_is_true_of_many_sets_is_said_once() -> None:
    def rows(**left_out: int) -> ReadRows:
        return ReadRows(n_rows=10, left_out=Counter(left_out), notes=["the note"])

    read = [("law", rows(b=2)), ("art", rows(b=1, c=1)), ("few", rows(c=1))]
    assert row_warnings(read) == [
        "'law', 'art', 'few': the note",
        "2 of the 10 rows of 'law', 2 of the 10 rows of 'art' were left out: 3 with b, 1 with c",
    ]
    assert row_warnings([(str(i), rows(b=2)) for i in range(58)])[1].endswith(
        "2 of the 10 rows of '3' and 54 more were left out: 116 with b"
    )
