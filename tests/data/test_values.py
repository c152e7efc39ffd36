"""Passages, answers and labels in the layouts of the data sets that people publish, rows written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sts_fast.data.examples import Example, load_examples, read_examples
from sts_fast.data.sources import origin_of
from sts_fast.errors import InputError

CASES = Path(__file__).parents[3] / "shared" / "cases"


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


LAYOUTS: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "BoolQ": ({"question": "is it", "passage": " It is. ", "answer": True}, "It is.\n\nis it", "yes"),
    "BoolQ, no": ({"question": "is it", "passage": "It is.", "answer": False}, "It is.\n\nis it", "no"),
    "SQuAD": (
        {"context": "C.", "question": "Q?", "title": "T", "answers": {"text": ["a", "b"], "answer_start": [0, 4]}},
        "C.\n\nQ?",
        "a",
    ),
    "SQuAD 2 without an answer": (
        {"context": "C.", "question": "Q?", "answers": {"text": [], "answer_start": []}},
        "C.\n\nQ?",
        None,
    ),
    "answers as a list of objects": (
        {"context": "C.", "question": "Q?", "answers": [{"text": "a", "answer_start": 3}]},
        "C.\n\nQ?",
        "a",
    ),
    "TriviaQA": (
        {"question": "Q?", "question_id": "t", "answer": {"value": "a", "aliases": ["b"], "normalized_value": "A"}},
        "Q?",
        "a",
    ),
    "Natural Questions": ({"question": "q", "answer": ["a", "b"]}, "q", "a"),
    "DROP": (
        {"section_id": "s", "passage": "P.", "question": "Q?", "answers_spans": {"spans": ["a"], "types": ["span"]}},
        "P.\n\nQ?",
        "a",
    ),
    "DROP, a number": (
        {"passage": "P.", "question": "Q?", "answer": {"number": "4", "date": {"day": ""}, "spans": []}},
        "P.\n\nQ?",
        "4",
    ),
    "DROP, several spans": (
        {"passage": "P.", "question": "Q?", "answer": {"number": "", "date": {}, "spans": ["a", "b"]}},
        "P.\n\nQ?",
        "a, b",
    ),
    "DROP, a date": (
        {
            "passage": "P.",
            "question": "Q?",
            "answer": {"number": "", "date": {"day": "3", "year": "1990"}, "spans": []},
        },
        "P.\n\nQ?",
        "3 1990",
    ),
    "PubMedQA": (
        {
            "pubid": 7,
            "question": "Q?",
            "context": {"contexts": ["One.", "Two."], "labels": ["BACKGROUND", "RESULTS"], "meshes": ["m"]},
            "long_answer": "Since.",
            "final_decision": "yes",
        },
        "One.\nTwo.\n\nQ?",
        "Since.",
    ),
    "PubMedQA without its conclusion": (
        {"question": "Q?", "context": {"contexts": ["One."]}, "final_decision": "maybe"},
        "One.\n\nQ?",
        "maybe",
    ),
    "HotpotQA": (
        {
            "question": "Q?",
            "answer": "a",
            "context": {"title": ["T", "U"], "sentences": [["One.", " Two."], ["Three."]]},
        },
        "T\nOne. Two.\n\nU\nThree.\n\nQ?",
        "a",
    ),
    "HotpotQA's own files": (
        {"_id": "5", "question": "Q?", "answer": "a", "context": [["T", ["One.", "Two."]]]},
        "T\nOne. Two.\n\nQ?",
        "a",
    ),
    "MuSiQue": (
        {"question": "Q?", "answer": "a", "paragraphs": [{"idx": 0, "title": "T", "paragraph_text": "One."}]},
        "T\nOne.\n\nQ?",
        "a",
    ),
    "MS MARCO": (
        {"query": "q", "passages": {"is_selected": [0], "passage_text": ["One.", "Two."]}, "answers": ["a"]},
        "One.\nTwo.\n\nq",
        "a",
    ),
    "SVAMP": ({"Body": "I have 2.", "Question": "And 2 more?", "Answer": 4.0}, "I have 2.\n\nAnd 2 more?", "4.0"),
    "ELI5": ({"question": "Q?", "answers": {"text": ["a", "b"], "score": [1, 9]}}, "Q?", "b"),
    "passage in the question already": (
        {"prompt": "Read: One\ntwo.\nQ?", "context": "One two.", "completion": "c"},
        "Read: One\ntwo.\nQ?",
        "c",
    ),
    "passage in two columns": ({"question": "Q?", "context": "C.", "contexts": ["C."], "answer": "a"}, "C.\n\nQ?", "a"),
    "Alpaca": ({"instruction": "Add", "input": "1 1", "output": "2"}, "Add\n\n1 1", "2"),
    "Dolly": ({"instruction": "Sum up", "context": "T.", "response": "r"}, "Sum up\n\nT.", "r"),
    "instruction with a passage": ({"instruction": "Sum up", "article": "T.", "output": "r"}, "Sum up\n\nT.", "r"),
    "empty passage": ({"question": "Q?", "context": " ", "answer": "a"}, "Q?", "a"),
}


@pytest.mark.parametrize(("row", "question", "answer"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layout(tmp_path: Path, row: dict[str, Any], question: str, answer: str | None) -> None:
    (example,) = load_examples(write(tmp_path / "a.jsonl", row))
    assert (example.question, example.answer) == (question, answer)


def test_structures_as_a_csv_holds_them(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(
        "context,question,answers\n"
        "\"[1] says C.\",Q?,\"{'text': array(['a', 'b'], dtype=object), 'answer_start': array([0, 4], dtype=int32)}\"\n"
        "\"{'contexts': ['One.', 'Two.']}\",R?,\"['c', 'd']\"\n"
    )
    assert [(example.question, example.answer) for example in load_examples(path)] == [
        ("[1] says C.\n\nQ?", "a"),
        ("One.\nTwo.\n\nR?", "c"),
    ]
    path.write_text("context,question,answers\nC.,Q?,\"{'text': <memory>}\"\n")
    with pytest.raises(InputError, match="row 1 has a text in 'answers'"):
        load_examples(path)


def test_earlier_turns_are_no_passage(tmp_path: Path) -> None:
    row = {"question": "Q?", "context": [{"role": "user", "content": "Hi"}], "answer": "a"}
    examples, rows = read_examples(origin_of(write(tmp_path / "a.jsonl", row), "train", "train"))
    assert (examples[0].question, rows.columns.unread) == ("Q?", ["context"])


def test_coqa_is_one_conversation(tmp_path: Path) -> None:
    row = {
        "source": "mctest",
        "story": "Once.",
        "questions": ["Who?", "Why?", "When?"],
        "answers": {"input_text": ["she", "so", "then"], "answer_start": [0, 1, 2], "answer_end": [1, 2, 3]},
    }
    path = write(tmp_path / "a.jsonl", row)
    context = (("user", "Once.\n\nWho?"), ("assistant", "she"), ("user", "Why?"), ("assistant", "so"))
    assert load_examples(path) == [Example("1", "When?", "then", context)]
    assert str(read_examples(origin_of(path, "train", "train"))[1].columns) == (
        "passage from story, question from questions, answer from answers; not read: source"
    )
    quac = {"context": "C.", "questions": ["Who?"], "answers": {"texts": [["she", "her"]], "answer_starts": [[0, 1]]}}
    assert load_examples(write(tmp_path / "b.jsonl", quac)) == [Example("1", "C.\n\nWho?", "she")]
    with pytest.raises(InputError, match="row 1 has 3 entries in 'questions', but 1 in 'answers'"):
        load_examples(write(tmp_path / "c.jsonl", row | {"answers": ["she"]}))


def test_a_passage_that_is_not_understood_is_named(tmp_path: Path) -> None:
    row = {"question": "Q?", "answer": "a", "context": {"table": [[1, 2]]}, "evidence": ["e"]}
    _, rows = read_examples(origin_of(write(tmp_path / "a.jsonl", row), "train", "train"))
    assert rows.columns.unread == ["context", "evidence"]


GOOD = [True, 1, 1.0, "True", "true", " TRUE ", "1", "yes", "good", "chosen", "desirable", "+1"]
BAD = [False, 0, 0.0, -1, "False", "false", "0", "no", "bad", "rejected", "undesirable", "-1"]


@pytest.mark.parametrize("label", [*GOOD, *BAD], ids=repr)
@pytest.mark.parametrize("column", ["label", "kto_tag"])
def test_only_good_replies_are_answers(tmp_path: Path, label: Any, column: str) -> None:
    # Of 1 and True, which are equal, each is its own case.
    is_good = any(label is good for good in GOOD)
    texts = {"prompt": "p", "completion": "c", column: label}
    turns = {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}], column: label}
    for row in (texts, turns):
        path = write(tmp_path / "a.jsonl", row)
        assert load_examples(path) == [Example("1", "p", "c" if is_good else None)]
        assert read_examples(origin_of(path, "train", "train"))[1].n_bad == (not is_good)


@pytest.mark.parametrize("label", [3, -0.5, "so-so", "maths", [True]])
def test_a_label_that_is_not_understood_is_named(tmp_path: Path, label: Any) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "p", "completion": "c", "label": label})
    with pytest.raises(
        InputError, match=r"a\.jsonl: row 1 has the label .*: write true or false, or rename the column"
    ):
        load_examples(path)


def test_a_reply_without_its_label_is_left_out(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completion": "c", "label": label} for label in (True, None, "")]
    examples, read = read_examples(origin_of(write(tmp_path / "a.jsonl", *rows), "train", "train"))
    assert len(examples) == 1
    assert read.left_out == {"no label that says whether its reply is good": 2}


def test_a_label_without_reply_or_beside_options_is_no_rating(tmp_path: Path) -> None:
    assert load_examples(write(tmp_path / "a.jsonl", {"question": "q", "label": "maths"})) == [Example("1", "q", None)]
    assert read_examples(origin_of(tmp_path / "a.jsonl", "train", "train"))[1].columns.unread == ["label"]
    row = {"question": "q", "answer": "a", "label": "a"}
    assert load_examples(write(tmp_path / "b.jsonl", row), answer_field="label") == [Example("1", "q", "a")]


@pytest.mark.skipif(not CASES.is_dir(), reason="the cases are not beside the checkout")
@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("15_boolq", [("Oslo lies in the north. It is cold.\n\nis it warm in oslo", "no")]),
        ("15b_squad", [("Oslo lies in the north.\n\nWhere is Oslo?", "in the north")]),
        ("15d_sciq", [("Ice is cold.\n\nWhat is cold?", "ice")]),
        ("17_kto_csv", [("Say hi", None), ("Say hi", "hi")]),
        ("17c_kto_tag", [("Say hi", None)]),
    ],
)
def test_reported_case(case: str, expected: list[tuple[str, str | None]]) -> None:
    (path,) = (CASES / case).glob("data.*")
    assert [(example.question, example.answer) for example in load_examples(path)] == expected
