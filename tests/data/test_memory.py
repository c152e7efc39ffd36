"""Rows in memory give the examples that the same rows give from a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from sts_fast.data.examples import Example, load_domains, load_examples
from sts_fast.data.sets import Fields, Sets
from sts_fast.errors import InputError

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
ROWS: list[dict[str, Any]] = [
    {"id": "a", "question": "Which?", "choices": ["x", "y"], "answer": 1, "subject": "law"},
    {"id": "b", "question": "Who?", "choices": ["p", "q"], "answer": 0, "subject": "art"},
    {"id": "c", "question": "Why?", "choices": ["v", "w"], "answer": None, "subject": "law"},
]
EXPECTED = [
    Example("a", "Which?\nA. x\nB. y", "B"),
    Example("b", "Who?\nA. p\nB. q", "A"),
    Example("c", "Why?\nA. v\nB. w", None),
]


class Stream:
    """A table of a library that Arrow can read, as polars' data frames are."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.table = pytest.importorskip("pyarrow").Table.from_pylist(rows)

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return self.table.__arrow_c_stream__(requested_schema)


def of_kind(kind: str, rows: list[dict[str, Any]]) -> Any:
    match kind:
        case "dicts":
            return rows
        case "other mappings":
            return tuple(MappingProxyType(row) for row in rows)
        case "numpy":
            return [
                {name: np.asarray(value) if isinstance(value, (list, int)) else value for name, value in row.items()}
                for row in rows
            ]
        case "arrow":
            return Stream(rows)
        case "pandas":
            return pytest.importorskip("pandas").DataFrame(rows)
    datasets = pytest.importorskip("datasets")
    kept = datasets.Dataset.from_list([rows[0], *rows]).select(range(1, len(rows) + 1))
    return kept if kind == "dataset" else kept.to_iterable_dataset()


KINDS = ("dicts", "other mappings", "numpy", "arrow", "pandas", "dataset", "stream")


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_every_kind(kind: str) -> None:
    rows = of_kind(kind, ROWS)
    assert load_examples(rows) == EXPECTED
    assert load_examples([rows, of_kind("dicts", [{"question": "more"}])])[3:] == [Example("4", "more", None)]
    assert load_domains([rows]) == {"law": [EXPECTED[0], EXPECTED[2]], "art": [EXPECTED[1]]}


@pytest.mark.parametrize("kind", KINDS)
def test_sets_of_every_kind(kind: str, tmp_path: Path) -> None:
    rows = of_kind(kind, ROWS)
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": CHAT}))
    sets = Sets.read({"train": rows}, {"all": rows, "chat": tmp_path / "chat.jsonl"}, {"train": rows}, Fields())
    assert sets.trains["train"] == sets.domains["all"] == sets.demos["train"] == EXPECTED
    assert sets.domains["chat"] == [Example("1", "Hi", "Hello")]
    split = Sets.read({"train": rows}, rows, None, Fields())
    assert split.domains == {"law": [EXPECTED[0], EXPECTED[2]], "art": [EXPECTED[1]]}
    assert sets.read_rows["train", "train"].columns.by_role == {
        "id": ["id"], "question": ["question"], "options": ["choices"], "answer": ["answer"],
    }  # fmt: skip
    [table] = sets.tables("train")
    assert (str(table), table.path) == ("'train' in memory", None)
    of_dicts = Sets.read({"train": ROWS}, {}, None, Fields()).tables("train")[0]
    assert table.sha256 == of_dicts.sha256


def test_conversations_in_memory() -> None:
    rows = [{"messages": CHAT}, {"messages": [{"role": "system", "content": "Be brief."}, *CHAT]}]
    for kind in KINDS:
        assert load_examples(of_kind(kind, rows)) == [
            Example("1", "Hi", "Hello"), Example("2", "Hi", "Hello", (("system", "Be brief."),)),
        ]  # fmt: skip


def test_examples_stay_as_they_are() -> None:
    sets = Sets.read({"train": EXPECTED}, {"law": tuple(EXPECTED)}, {"law": EXPECTED}, Fields())
    assert sets.trains["train"] == sets.domains["law"] == sets.demos["law"] == EXPECTED
    assert not sets.read_rows


def test_splits_in_memory() -> None:
    datasets = pytest.importorskip("datasets")
    splits = datasets.DatasetDict(
        {name: datasets.Dataset.from_list([{"question": name, "answer": "x"}]) for name in ("train", "dev", "test")}
    )
    sets = Sets.read({"train": splits}, {"law": splits}, {"law": splits}, Fields())
    assert [of["law"][0].question for of in (sets.domains, sets.demos)] == ["test", "dev"]
    assert sets.trains["train"][0].question == "train"
    assert sets.left_out() == [
        "Not read beside the training sets: dev, test",
        "Not read beside the domains: train, dev",
        "Not read beside the demonstrations: train, test",
    ]
    with pytest.raises(InputError, match="'train' in memory contains dev, test and none is called train"):
        load_examples(datasets.DatasetDict({name: splits[name] for name in ("dev", "test")}))


def test_pictures_are_not_decoded() -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"question": ["What is this?"], "image": [{"bytes": b"damaged", "path": None}]})
    with pytest.raises(InputError, match="row 1 has image in 'image'; only text is read"):
        load_examples(rows.cast_column("image", datasets.Image()))


def test_a_selection_of_a_data_frame_keeps_named_columns_only() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(ROWS)
    assert load_examples(frame[frame["subject"] == "law"]) == [EXPECTED[0], EXPECTED[2]]
    assert load_examples(frame.set_index("id")) == EXPECTED
    fractions = pandas.DataFrame({"question": ["Half?", "Two?", "None?"], "answer": [0.5, 2.0, None]})
    assert [example.answer for example in load_examples(fractions)] == ["0.5", "2.0", None]


def broken() -> Iterator[dict[str, Any]]:
    yield {"question": "q"}
    raise OSError("the line\nwas cut")


UNUSABLE: dict[str, tuple[Any, str]] = {
    "a row that is none": ([{"question": "q"}, 3], "'train' in memory: row 2 has a number instead of named fields"),
    "an empty question": ([{"question": " "}], "'train' in memory: row 1 has no values"),
    "unknown columns": ([{"foo": "q"}], "'train' in memory has no column known to hold questions among foo"),
    "a dict of columns": ({"question": ["q"]}, "'train' is a dict; give a .*; or a list of dicts, a data set of"),
    "a number": (3, "'train' is a int; give a .*; or a list of dicts, a data set of datasets, a data frame"),
    "nothing": (None, "'train' is a NoneType; give a .*; or a list of dicts"),
}


@pytest.mark.parametrize(("rows", "message"), UNUSABLE.values(), ids=UNUSABLE.keys())
def test_unusable_rows_are_one_sentence(rows: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_examples(rows, strict=True)
    with pytest.raises(InputError, match=message):
        Sets.read({"train": rows}, {}, None, Fields(strict=True))


def test_what_their_library_raises_is_one_sentence() -> None:
    datasets, pandas = pytest.importorskip("datasets"), pytest.importorskip("pandas")
    stream = datasets.IterableDataset.from_generator(broken)
    mixed = pandas.DataFrame({"question": ["q", 3, ["r"]]})
    for rows in (stream, mixed):
        with pytest.raises(
            InputError, match=r"'train' in memory cannot be read \(.*\); give its rows as a list"
        ) as caught:
            load_examples(rows)
        assert "\n" not in str(caught.value)
