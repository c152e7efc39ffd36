"""Readers of training sets and domains, on rows written by hand and on the files that people publish."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sts_fast.data.examples import Example, load_domains, load_examples, read_examples
from sts_fast.data.sources import origin_of
from sts_fast.data.turns import ToolCall
from sts_fast.errors import InputError

ASSETS = Path(__file__).parents[3] / "shared" / "assets"
needs_assets = pytest.mark.skipif(not ASSETS.is_dir(), reason="the published files are not beside the checkout")

ROW = {"question": "1+1?", "answer": "2"}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": " 1+1? "},
    {"role": "assistant", "content": "2"},
]
CHAT_CONTEXT = (("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"))


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(tmp_path: Path, *rows: dict[str, Any], **fields: str) -> list[Example]:
    return load_examples(write_jsonl(tmp_path / "rows.jsonl", [*rows]), **fields)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


# Kinds of rows --------------------------------------------------------------------------------------------------------

ROW_KINDS = {
    "question and answer": ({"Question": " 1+1? ", "Answer": "2\n"}, Example("1", "1+1?", "2")),
    "problem and worked solution": ({"problem": "p", "answer": "4", "solution": "2+2=4"}, Example("1", "p", "2+2=4")),
    "upper case": ({"QUESTION": "q", "final_decision": "yes", "LONG_ANSWER": "long"}, Example("1", "q", "long")),
    "prompt and completion": ({"prompt": "p", "completion": " c"}, Example("1", "p", "c")),
    "prompt and response": ({"prompt": "p", "response": "r", "answer": "a"}, Example("1", "p", "r")),
    "prompt only": ({"prompt": "p"}, Example("1", "p", None)),
    "input and output": ({"input": "i", "output": "o"}, Example("1", "i", "o")),
    "code keeps its indentation": (
        {"task_id": "H/0", "prompt": "def f():\n", "canonical_solution": "\n    x = 1\n    return x\n"},
        Example("H/0", "def f():", "    x = 1\n    return x"),
    ),
    "alpaca": ({"instruction": "Add", "input": "1 1", "output": "2"}, Example("1", "Add\n\n1 1", "2")),
    "alpaca without input": ({"instruction": "Add", "input": "", "output": "2"}, Example("1", "Add", "2")),
    "alpaca with system and history": (
        {"instruction": "i", "input": "", "output": "o", "system": "s", "history": [["q", "a"]]},
        Example("1", "i", "o", (("system", "s"), ("user", "q"), ("assistant", "a"))),
    ),
    "dolly": ({"instruction": "Sum up", "context": "text", "response": "r"}, Example("1", "Sum up\n\ntext", "r")),
    "number as answer": ({"id": 60, "problem": "p", "answer": 27.0}, Example("60", "p", "27.0")),
    "alternative answers": ({"question": "q", "answer": ["", "a", "b"]}, Example("1", "q", "a")),
    "no answer": ({"question": "q", "answer": None}, Example("1", "q", None)),
    "empty answer": ({"question": "q", "answer": " \n"}, Example("1", "q", None)),
    "NaN answer": ({"question": "q", "answer": float("nan")}, Example("1", "q", None)),
    "messages": ({"messages": CHAT}, Example("1", "1+1?", "2", CHAT_CONTEXT)),
    "messages win over columns beside them": (
        {"problem": "p", "answer": "42", "messages": CHAT[1:3]},
        Example("1", "Hi", "Hello"),
    ),
    "last user turn with a reply": ({"messages": [*CHAT, CHAT[1]]}, Example("1", "1+1?", "2", CHAT_CONTEXT)),
    "conversation without reply": ({"messages": CHAT[1:2]}, Example("1", "Hi", None)),
    "open conversation and answer": ({"messages": CHAT[1:2], "answer": "Yo"}, Example("1", "Hi", "Yo")),
    "content in parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, CHAT[2]]},
        Example("1", "Hi", "Hello"),
    ),
    "tool call of OpenAI's kind": (
        {"messages": [CHAT[1], {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]},
        Example("1", "Hi", '{"name": "f", "arguments": {}}', tool_calls=(ToolCall("f", "{}"),)),
    ),
    "ShareGPT with tools": (
        {
            "conversations": [
                {"from": "human", "value": "weather?"},
                {"from": "function_call", "value": "f()"},
                {"from": "observation", "value": "sun"},
                {"from": "gpt", "value": "Sunny."},
                {"from": "human", "value": "Thanks"},
                {"from": "gpt", "value": "Welcome"},
            ],
            "tools": "[]",
        },
        Example(
            "1",
            "Thanks",
            "Welcome",
            (("user", "weather?"), ("assistant", "f()"), ("tool", "sun"), ("assistant", "Sunny.")),
        ),
    ),
    "system beside ShareGPT": (
        {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        Example("1", "q", "a", (("system", "s"),)),
    ),
    "conversational prompt and completion": (
        {"prompt": CHAT[:4], "completion": CHAT[4:]},
        Example("1", "1+1?", "2", CHAT_CONTEXT),
    ),
    "preference": ({"prompt": "p", "chosen": "good", "rejected": "bad"}, Example("1", "p", "good")),
    "conversational preference": (
        {"prompt": CHAT[1:2], "chosen": [CHAT[2]], "rejected": [CHAT[4]]},
        Example("1", "Hi", "Hello"),
    ),
    "preference without prompt": ({"chosen": CHAT[1:3], "rejected": CHAT[3:]}, Example("1", "Hi", "Hello")),
    "preference with prompt and whole conversation": (
        {"prompt": "Hi", "chosen": CHAT[1:3], "rejected": CHAT[3:]},
        Example("1", "Hi", "Hello"),
    ),
    "ShareGPT preference": (
        {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"}, "rejected": {}},
        Example("1", "q", "a"),
    ),
    "desired reply": ({"prompt": "p", "completion": "c", "label": True}, Example("1", "p", "c")),
    "undesired reply": ({"prompt": "p", "completion": "c", "label": False}, Example("1", "p", None)),
    "options": (
        {"question_id": 7, "question": "Which?", "options": ["x", "y"], "answer": "B", "cot_content": ""},
        Example("7", "Which?\nA. x\nB. y", "B"),
    ),
    "chain of thought before letter": (
        {"question": "Which?", "options": ["x", "y"], "answer": "B", "cot_content": "A: Let's see. B."},
        Example("1", "Which?\nA. x\nB. y", "Let's see. B."),
    ),
    "index of a choice": (
        {"question": "Which?", "choices": ["0", "1"], "answer": 1, "subject": "maths"},
        Example("1", "Which?\nA. 0\nB. 1", "B"),
    ),
    "labelled choices": (
        {"question": "Which?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"},
        Example("1", "Which?\n1. x\n2. y", "2"),
    ),
    "options that carry letters": (
        {"question": "Which?", "options": ["A)21", "B)22"], "rationale": "it is A"},
        Example("1", "Which?\nA)21\nB)22", "it is A"),
    ),
    "options in the question already": (
        {"question": "Which?\nA. x\nB. y", "options": ["x", "y"], "answer": "A"},
        Example("1", "Which?\nA. x\nB. y", "A"),
    ),
    "rendered chat template": (
        {
            "input": "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n"
            "<|im_start|>assistant\n<think>\n\n</think>\n\n",
            "output": "a",
        },
        Example("1", "q", "a", (("system", "s"),)),
    ),
    "rendered chat template that begins the reply": (
        {"input": "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>", "output": "\nhm</think>a"},
        Example("1", "q", "<think>\nhm</think>a"),
    ),
}


@pytest.mark.parametrize(("row", "expected"), ROW_KINDS.values(), ids=ROW_KINDS.keys())
def test_row_kind(tmp_path: Path, row: dict[str, Any], expected: Example) -> None:
    assert read(tmp_path, row) == [expected]


def test_row_kinds_survive_parquet(tmp_path: Path) -> None:
    rows = [ROW_KINDS["options"][0], ROW_KINDS["chain of thought before letter"][0] | {"question_id": None}]
    expected = [ROW_KINDS["options"][1], Example("2", "Which?\nA. x\nB. y", "Let's see. B.")]
    assert load_examples(write_parquet(tmp_path / "a.parquet", rows)) == expected
    chats = [{"messages": CHAT}, {"messages": CHAT[1:3]}]
    assert load_examples(write_parquet(tmp_path / "b.parquet", chats)) == [
        Example("1", "1+1?", "2", CHAT_CONTEXT),
        Example("2", "Hi", "Hello"),
    ]


def test_named_fields_override_detection(tmp_path: Path) -> None:
    row = {"question": "q", "rewritten": "better q", "answer": "a", "meta": {"truth": {"final": 3}}, "a.b": "dotted"}
    assert read(tmp_path, row, question_field="rewritten") == [Example("1", "better q", "a")]
    assert read(tmp_path, row, answer_field="meta.truth.final") == [Example("1", "q", "3")]
    assert read(tmp_path, row, answer_field="a.b") == [Example("1", "q", "dotted")]
    assert read(tmp_path, {"dialogue": CHAT}, question_field="dialogue") == [Example("1", "1+1?", "2", CHAT_CONTEXT)]


def test_named_answer_may_be_missing_in_some_rows(tmp_path: Path) -> None:
    rows = [{"question": "q"}, {"question": "r", "gold": "a"}]
    assert [example.answer for example in read(tmp_path, *rows, answer_field="gold")] == [None, "a"]


# Kinds of files -------------------------------------------------------------------------------------------------------


def test_rows_are_numbered_by_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"question": "a\u2028b"}\r\n\r\n{"question": "c"}', encoding="utf-8")
    assert load_examples(path) == [Example("1", "a\u2028b", None), Example("3", "c", None)]


@pytest.mark.parametrize(
    ("document", "ids"),
    [
        ([ROW, ROW], ["1", "2"]),
        ({"k1": ROW, "k2": ROW}, ["k1", "k2"]),
        ({"k1": ROW | {"id": "own"}}, ["own"]),
        ({"version": 1, "data": [ROW]}, ["1"]),
        ({"train": [ROW], "rows": [ROW, ROW]}, ["1"]),
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_json_documents(tmp_path: Path, document: Any, ids: list[str], indent: int | None) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(document, indent=indent))
    assert load_examples(path) == [Example(id, "1+1?", "2") for id in ids]


def test_json_lines_called_json(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [ROW, ROW]).rename(tmp_path / "a.json")
    assert [example.id for example in load_examples(path)] == ["1", "2"]


def test_gzip(tmp_path: Path) -> None:
    for name, text in {
        "a.jsonl.gz": json.dumps(ROW),
        "b.json.gz": json.dumps([ROW]),
        "c.CSV.GZ": "question,answer\n1+1?,2\n",
    }.items():
        (tmp_path / name).write_bytes(gzip.compress(text.encode()))
        assert load_examples(tmp_path / name) == [Example("1", "1+1?", "2")]


def test_csv_values_stay_text(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('Question,Answer\n"a, ""b""\nc",007\nd,\n' + f"e,{'x' * 200_000}\n")
    first, second, third = load_examples(path)
    assert first == Example("1", 'a, "b"\nc', "007")
    assert second.answer is None
    assert third.answer is not None
    assert len(third.answer) == 200_000


def test_folder_reads_the_training_split(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "gsm" / "train.jsonl", [ROW])
    write_jsonl(tmp_path / "gsm" / "test.jsonl", [ROW, ROW])
    (tmp_path / "gsm" / "README.md").write_text("about")
    assert len(load_examples(tmp_path / "gsm")) == 1
    (tmp_path / "gsm" / "train.jsonl").rename(tmp_path / "gsm" / "validation.jsonl")
    with pytest.raises(InputError, match=r"gsm contains test, validation and none is called train"):
        load_examples(tmp_path / "gsm")


def test_folder_of_shards_numbers_rows_through(tmp_path: Path) -> None:
    for i in range(2):
        write_parquet(tmp_path / "hub" / "data" / f"train-{i:05}-of-00002.parquet", [ROW, ROW])
    assert [example.id for example in load_examples(tmp_path / "hub")] == ["1", "2", "3", "4"]


def test_saved_dataset(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"messages": CHAT, "category": "a"}, {"messages": CHAT[1:3], "category": "b"}] * 3
    dataset = datasets.Dataset.from_list(rows)
    dataset.save_to_disk(str(tmp_path / "one"), num_shards=2)
    expected = [Example(str(i), *("1+1?", "2", CHAT_CONTEXT) if i % 2 else ("Hi", "Hello")) for i in range(1, 7)]
    assert load_examples(tmp_path / "one") == expected
    assert {name: len(found) for name, found in load_domains([str(tmp_path / "one")]).items()} == {"a": 3, "b": 3}

    datasets.DatasetDict({"test": dataset.select(range(2)), "train": dataset}).save_to_disk(str(tmp_path / "two"))
    assert load_examples(tmp_path / "two") == expected
    datasets.DatasetDict({"dev": dataset, "test": dataset}).save_to_disk(str(tmp_path / "three"))
    with pytest.raises(InputError, match="three contains dev, test and none is called train"):
        load_examples(tmp_path / "three")


# What cannot be used --------------------------------------------------------------------------------------------------

BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    "unknown suffix": ("a.txt", b"text", "a.txt has an unknown suffix"),
    "pickle": ("a.pkl", b"\x80\x04.", "a.pkl has an unknown suffix"),
    "empty": ("a.jsonl", b"\n", "a.jsonl holds no examples"),
    "empty json": ("a.json", b"", "a.json holds no examples"),
    "empty list": ("a.json", b"[]", "a.json holds no examples"),
    "header only": ("a.csv", b"question,answer\n", "a.csv holds no examples"),
    "broken line": ("a.jsonl", b'{"question": "q"}\n{"question": \n', "a.jsonl: line 2 has text that is not JSON"),
    "broken document": ("a.json", b'[\n{"question": "q"},\n}]', "a.json: line 3 is not JSON"),
    "no end of digits": ("a.jsonl", b"9" * 5000, "a.jsonl: line 1 has text that is not JSON"),
    "no end of brackets": ("a.jsonl", b"[" * 200_000, "a.jsonl: is not JSON"),
    "row is no object": ("a.jsonl", b'{"question": "q"}\n[1]\n', "a.jsonl: row 2 has a list instead of named fields"),
    "document is a scalar": ("a.json", b"3", "a.json contains neither a list of rows nor"),
    "several lists": ("a.json", b'{"rows": [], "items": []}', "a.json contains rows, items and none is called train"),
    "no known column": (
        "a.jsonl",
        b'{"Foo": 1, "bar": 2}',
        "a.jsonl has no column known.* among Foo, bar; .*--question-",
    ),
    "no question": ("a.jsonl", b'{"question": "q"}\n{"question": " "}', "a.jsonl: row 2 has no question in 'question'"),
    "column gone": ("a.jsonl", b'{"question": "q"}\n{"answer": "a"}', "a.jsonl: row 2 has no question in 'question'"),
    "question is a number": ("a.jsonl", b'{"question": 3}', "a.jsonl: row 1 has a number in 'question'"),
    "answer is an object": ("a.jsonl", b'{"question": "q", "answer": {"a": 1}}', "row 1 has an object in 'answer'"),
    "empty user turn": ("a.jsonl", b'{"messages": [{"role": "user", "content": ""}]}', "row 1 has an empty question"),
    "no user turn": ("a.jsonl", b'{"messages": [{"role": "system", "content": "s"}]}', "row 1 has no turn of the user"),
    "unknown role": ("a.jsonl", b'{"messages": [{"role": "cat", "content": "s"}]}', "row 1 has a turn .* role 'cat'"),
    "turn is no object": ("a.jsonl", b'{"messages": [{"role": "user", "content": "s"}, 3]}', "turn that is a number"),
    "image": ("a.jsonl", b'{"messages": [{"role": "user", "content": [{"image": 1}]}]}', "row 1 .* not text"),
    "history": ("a.jsonl", b'{"instruction": "i", "history": ["q"]}', "row 1 has a history that is no list"),
    "options": ("a.jsonl", b'{"question": "q", "options": 3}', "row 1 has options in 'options' that are not a list"),
    "half a character": ("a.jsonl", rb'{"question": "\ud800"}', "row 1 has half a character .* in 'question'"),
    "latin-1": ("a.jsonl", b'{"question": "q"}\n{"question": "\xe9"}', "a.jsonl: line 2 is not UTF-8"),
    "ragged csv": ("a.csv", b"question,answer\na,b\na,b,c\n", "a.csv: row 2 has 3 values for 2 columns"),
    "open quote": ("a.csv", b'question\n"a\n', "a.csv: line 2 is not CSV"),
    "truncated gzip": ("a.jsonl.gz", gzip.compress(b'{"question": "q"}\n' * 99)[:-12], "a.jsonl.gz cannot be read"),
    "not gzip": ("a.jsonl.gz", b'{"question": "q"}', "a.jsonl.gz cannot be read"),
    "not parquet": ("a.parquet", b"PAR1 or so", "a.parquet cannot be read"),
}


GOOD_ROW = b'{"messages": [{"role": "user", "content": "q"}]}\n'
BAD_ROWS: dict[str, tuple[str, bytes, str]] = {
    "not JSON": ("a.jsonl", GOOD_ROW + b'{"messages": [{"ro\n', "text that is not JSON"),
    "not JSON, in lines": ("a.json", GOOD_ROW + b"}\n", "text that is not JSON"),
    "ragged": ("a.csv", b"question\nq\na,b\n", "2 values for 1 columns"),
    "no letter": ("a.csv", b"q,x,y,B\n" * 300 + b"q,x,y,yes\n", "the answer 'yes', which is no letter of its options"),
    "role": (
        *("a.jsonl", GOOD_ROW + b'{"messages": [{"role": "narrator", "content": "q"}]}'),
        "a turn of the unknown role 'narrator'",
    ),
    "call": (
        *("a.jsonl", GOOD_ROW + b'{"messages": [{"role": "assistant", "tool_calls": [{"arguments": {}}]}]}'),
        "a tool call without a name",
    ),
    "image": ("a.jsonl", GOOD_ROW + GOOD_ROW.strip()[:-1] + b', "images": ["a.png"]}', "images in 'images'"),
}


@pytest.mark.parametrize(("name", "data", "reason"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_row_that_cannot_be_read_is_left_out_with_a_count(tmp_path: Path, name: str, data: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(data)
    examples, read = read_examples(origin_of(tmp_path / name, "train", "train"))
    assert read.left_out == {reason: 1}
    assert len(examples) == read.n_rows - 1
    with pytest.raises(InputError, match=f"has {re.escape(reason)}; "):
        load_examples(tmp_path / name, strict=True)


@pytest.mark.parametrize(("name", "data", "message"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_unusable_file(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        load_examples(tmp_path / name, strict=True)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5)
COLUMNS = ("question", "prompt", "messages", "conversations", "instruction", "input", "chosen", "answer", "completion")
NAMES = st.sampled_from(
    (
        *(*COLUMNS, "options", "history", "system", "label", "category", "id", "role", "content", "from"),
        *("tools", "images", "text", "tool_calls", "function_call", "name", "arguments", "reasoning", "human"),
    )
)
VALUES = st.recursive(
    SCALARS | st.sampled_from(["user", "assistant"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.dictionaries(NAMES, VALUES, max_size=6) | VALUES, max_size=3), st.booleans())
def test_rows_of_any_shape_give_examples_or_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], as_lines: bool
) -> None:
    folder = tmp_path_factory.getbasetemp()
    path = folder / ("any.jsonl" if as_lines else "any.json")
    path.write_text("\n".join(map(json.dumps, rows)) if as_lines else json.dumps(rows))
    sentence, domains = "", {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            domains = load_domains([str(path)])
    except InputError as error:
        sentence = str(error)
    assert domains or str(path) in sentence
    "".join(domains).encode()
    for example in (example for examples in domains.values() for example in examples):
        assert example.question.strip()
        assert example.answer is None or example.answer.strip()
        assert all(role in ("system", "user", "assistant", "tool") for role in (turn.role for turn in example.context))
        f"{example.id}{example.question}{example.answer}{example.context}".encode()


def test_damaged_parquet_never_crashes(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [ROW | {"options": ["x", "y"], "n": i} for i in range(50)])
    data = path.read_bytes()
    for at in range(0, len(data), 7):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])
        with contextlib.suppress(InputError):
            load_examples(path)


def test_truncated_parquet(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [ROW] * 5000)
    data = path.read_bytes()
    for cut in (0, 10, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(InputError, match=r"a\.parquet cannot be read"):
            load_examples(path)


def test_damaged_saved_dataset(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([ROW] * 500).save_to_disk(str(tmp_path / "set"))
    (arrow,) = (tmp_path / "set").glob("*.arrow")
    data = arrow.read_bytes()
    arrow.write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"\.arrow cannot be read"):
        load_examples(tmp_path / "set")
    arrow.unlink()
    with pytest.raises(InputError, match=r"\.arrow cannot be read \(.*No such file"):
        load_examples(tmp_path / "set")
    (tmp_path / "set" / "state.json").write_text("{}")
    with pytest.raises(InputError, match=r"state\.json names no data files"):
        load_examples(tmp_path / "set")


def test_missing_paths(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.jsonl does not exist"):
        load_examples(tmp_path / "nowhere.jsonl")
    with pytest.raises(InputError, match="does not exist"):
        load_examples("x" * 5000)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / ".hidden.jsonl").write_text(json.dumps(ROW))
    with pytest.raises(InputError, match="bare contains no example files"):
        load_examples(tmp_path / "bare")


def test_missing_fields(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="row 1 has no field 'ask'; its columns are question, answer"):
        read(tmp_path, ROW, question_field="ask")
    with pytest.raises(InputError, match=r"rows\.jsonl has no field 'meta.gold'; its columns are question, answer"):
        read(tmp_path, ROW, answer_field="meta.gold")


# Domains --------------------------------------------------------------------------------------------------------------


def questions(domains: dict[str, list[Example]]) -> dict[str, list[str]]:
    return {name: [example.question for example in examples] for name, examples in domains.items()}


def test_domains_of_each_kind_of_source(tmp_path: Path) -> None:
    rows = [{"question": q, "Category": c} for q, c in (("1", "law"), ("2", "art"), ("3", "law"))]
    split = write_jsonl(tmp_path / "split.jsonl", rows)
    plain = write_jsonl(tmp_path / "plain.jsonl", [ROW])
    assert questions(load_domains([str(split), str(plain), f"all={split}"])) == {
        "law": ["1", "3"],
        "art": ["2"],
        "plain": ["1+1?"],
        "all": ["1", "2", "3"],
    }


def test_domain_folder_is_one_domain_a_file(tmp_path: Path) -> None:
    folder = tmp_path / "domains"
    write_jsonl(folder / "b.jsonl", [ROW | {"subject": "ignored"}])
    (folder / "a.jsonl.gz").parent.mkdir(exist_ok=True)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps(ROW).encode()))
    for i in range(2):
        write_parquet(folder / f"c-{i:05}-of-00002.parquet", [ROW])
    for ignored in (".hidden.jsonl", "README.md", "SOURCE.txt"):
        (folder / ignored).write_text("x")
    assert [(name, len(found)) for name, found in load_domains([str(folder)]).items()] == [("a", 1), ("b", 1), ("c", 2)]


def test_folder_that_is_one_set_of_shards_is_split_by_category(tmp_path: Path) -> None:
    for i in range(2):
        rows = [{"question": "q", "category": "x"}, {"question": "q", "category": f"only {i}"}]
        write_parquet(tmp_path / "mmlu" / f"test-{i:05}-of-00002.parquet", rows)
    assert {name: len(found) for name, found in load_domains([str(tmp_path / "mmlu")]).items()} == {
        "x": 2,
        "only 0": 1,
        "only 1": 1,
    }


def test_existing_path_with_equals_sign_wins(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "lr=3.jsonl", [ROW])
    assert [*load_domains([str(path)])] == ["lr=3"]
    assert [*load_domains([f"x={path}"])] == ["x"]


def test_domain_fields(tmp_path: Path) -> None:
    a = write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "hard": "h", "gold": "g"}])
    b = write_jsonl(tmp_path / "b.jsonl", [{"question": "q", "gold": "g"}])
    domains = load_domains([str(a), f"bee={b}"], question_fields={"a": "hard"}, answer_fields={"": "gold"})
    assert domains == {"a": [Example("1", "h", "g")], "bee": [Example("1", "q", "g")]}
    with pytest.raises(InputError, match="a field is named for 'b', but the sources are a, bee"):
        load_domains([str(a), f"bee={b}"], answer_fields={"b": "gold"})


def test_unusable_domains(tmp_path: Path) -> None:
    plain = write_jsonl(tmp_path / "law.jsonl", [ROW])
    gaps = write_jsonl(tmp_path / "gaps.jsonl", [ROW | {"category": "law"}, ROW])
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    for sources, message in (
        ([plain, plain], "domain 'law' of .* exists already; name it with NAME=PATH"),
        ([plain, f"law={plain}"], "domain 'law' of .* exists already"),
        ([gaps], "row 2 has no category; fill it in, or give the file as NAME=PATH"),
        ([empty], "empty.jsonl holds no examples"),
        ([f"={plain}"], "lacks its name or its path; write NAME=PATH"),
        (["law="], "lacks its name or its path; write NAME=PATH"),
        (["nowhere"], "nowhere does not exist"),
        (["law=nowhere"], "nowhere does not exist"),
    ):
        with pytest.raises(InputError, match=message):
            load_domains([str(source) for source in sources], strict=True)


# Published files ------------------------------------------------------------------------------------------------------

# path under the assets, number of examples, id, start of the question, its end, start of the answer, its end
PUBLISHED = [
    ("data/gsm8k/train.jsonl", 7473, "1", "Natalia sold clips", "April and May?", "Natalia sold 48/2", "#### 72"),
    ("data/math500/MATH500.jsonl", 500, "test/precalculus/807.json", "Convert", "2 \\pi.$", "We have", "\\right)}.$"),
    ("data/limo_eval/aime.jsonl", 30, "60", "Every morning Aya", "coffee shop.", "$\\frac{9}{s}", "-sepehr2010"),
    ("data/limo_eval/amc.jsonl", 40, "0", "Cities $A$ and $B$", "will they be when they meet?", "27.0", "27.0"),
    ("data/limo_eval/math.jsonl", 500, "test/precalculus/807.json", "Convert", "2 \\pi.$", "We have", "\\right)}.$"),
    ("data/limo_eval/olympiadbench.jsonl", 675, "1606", "Xenia and Sergey", "thought of?", "2", "2"),
    ("data/mmlu_pro/test-00000-of-00001.parquet", 12032, "70", "Typical advert", "Distress, Fear, Serious", "I", "I"),
    ("data/mmlu_pro/validation_cot70.jsonl", 70, "0", "The symmetric", "\nI. 20\nJ. 5", "Let's think", "is (A)."),
    ("data/pubmedqa/ori_pqal.json", 1000, "21645374", "Programmed cell", "death?", "Results", "lace plant."),
    ("data/humaneval/HumanEval.jsonl.gz", 164, "HumanEval/0", "from", 'True\n    """', "    for idx,", "return False"),
    ("data/unireason/UniReason-SFT_math500.jsonl", 500, "1", "Solve the following", "Answer:", "Okay, so I need", "$$"),
    ("data/unireason/UniReason-RL_coqa.jsonl", 500, "1", "Once upon a time", "\nA:", "Q: What color", "A: white"),
    ("formats/sft/alpaca.json", 40, "1", "Describe a process", "crepes.", "Making crepes", "Enjoy!"),
    ("formats/sft/sharegpt.json", 40, "1", "They both sound", "for me?", "I'm sorry, but as an AI", "you need."),
    ("formats/sft/sharegpt_dpo.json", 40, "1", "Hi! I'd like to create", "Angela.", "That sounds", "Good luck!"),
    ("formats/sft/messages.jsonl", 200, "1", "The Federal Trade", "I think the answer is", "Ooh ooh ah ah!", "Woohoo!"),
    ("formats/sft/gsm8k_messages.jsonl", 200, "1", "Natalia", "April and May?", "Natalia sold 48", "#### 72"),
    ("formats/sft/gsm8k_prompt_completion.jsonl", 200, "1", "Natalia", "April and May?", "Natalia sold 48", "#### 72"),
]  # fmt: skip


@needs_assets
@pytest.mark.parametrize(("path", "n", "id", "begin", "end", "answer", "answer_end"), PUBLISHED)
def test_published_file(path: str, n: int, id: str, begin: str, end: str, answer: str, answer_end: str) -> None:
    examples = load_examples(ASSETS / path)
    assert len(examples) == n
    assert len({example.id for example in examples}) == n
    first = examples[0]
    assert first.id == id
    assert first.question.startswith(begin)
    assert first.question.endswith(end)
    assert first.answer is not None
    assert first.answer.startswith(answer)
    assert first.answer.endswith(answer_end)
    for example in examples:
        assert example.question == example.question.strip() != ""
        assert example.answer is not None
        assert example.answer.strip()
        assert "<|im_" not in example.question


@needs_assets
def test_published_conversations_keep_their_turns() -> None:
    first = load_examples(ASSETS / "formats/sft/sharegpt.json")[0]
    assert [turn.role for turn in first.context] == [
        *("tools", "user", "assistant", "user", "assistant", "tool", "assistant")
    ]
    preferred = load_examples(ASSETS / "formats/sft/sharegpt_dpo.json")[21 - 1]
    assert [turn.role for turn in preferred.context] == ["system"]
    rows = json.loads((ASSETS / "formats/sft/messages_kto.json").read_text())
    answers = [example.answer is not None for example in load_examples(ASSETS / "formats/sft/messages_kto.json")]
    assert answers == [row["label"] for row in rows]
    assert len(set(answers)) == 2


@needs_assets
def test_published_domains() -> None:
    sample = load_domains([str(ASSETS / "data/mmlu_pro/sample_40_per_category.jsonl")])
    assert {len(examples) for examples in sample.values()} == {40}
    demos = load_domains([str(ASSETS / "data/mmlu_pro/validation_cot70.jsonl")])
    assert {len(examples) for examples in demos.values()} == {5}
    assert demos.keys() == sample.keys()
    assert len(demos) == 14
    assert [*load_domains([str(ASSETS / "data/limo_eval")])] == ["aime", "amc", "math", "olympiadbench"]
    assert "Precalculus" in load_domains([str(ASSETS / "data/math500/MATH500.jsonl")])
    assert [*load_domains([f"health={ASSETS / 'data/pubmedqa'}"])] == ["health"]


@needs_assets
@pytest.mark.parametrize(
    "path",
    [
        "data/mmlu_pro/actual_change_pairs.json",
        "data/mmlu_pro/predictions.csv.gz",
        "formats/neuronpedia/batch-0.jsonl.gz",
    ],
)
def test_published_file_without_questions_is_refused(path: str) -> None:
    with pytest.raises(InputError, match="has no column known to hold questions"):
        load_examples(ASSETS / path)
