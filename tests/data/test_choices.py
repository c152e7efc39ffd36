"""Multiple-choice questions in the layouts of the data sets that people publish, rows written by hand."""

from __future__ import annotations

import csv
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sts_fast.data.examples import Example, load_examples, read_examples
from sts_fast.data.sources import origin_of
from sts_fast.errors import InputError

LINES = "A. x\nB. y\nC. z\nD. w"
FOUR = ["x", "y", "z", "w"]


def read(tmp_path: Path, *rows: dict[str, Any], strict: bool = True) -> list[Example]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_examples(path, strict=strict)


LAYOUTS: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "MMLU": ({"question": "Q?", "subject": "law", "choices": FOUR, "answer": 2}, f"Q?\n{LINES}", "C"),
    "MMLU as CSV": ({"question": "Q?", "A": "x", "B": "y", "C": "z", "D": "w", "answer": "C"}, f"Q?\n{LINES}", "C"),
    "ARC": (
        {"id": "1", "question": "Q?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
        "Q?\nA. x\nB. y",
        "B",
    ),
    "ARC with numbers as labels": (
        {"id": "1", "question": "Q?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "1"},
        "Q?\n1. x\n2. y",
        "1",
    ),
    "ARC with numbers as labels and texts": (
        {"id": "1", "question": "Q?", "choices": {"text": ["2", "1"], "label": ["1", "2"]}, "answerKey": "1"},
        "Q?\n1. 2\n2. 1",
        "1",
    ),
    "OpenBookQA": (
        {"id": "1", "question_stem": "Q", "choices": {"text": FOUR, "label": [*"ABCD"]}, "answerKey": "D"},
        f"Q\n{LINES}",
        "D",
    ),
    "CommonsenseQA": (
        {
            "id": "1",
            "question": "Q?",
            "question_concept": "c",
            "choices": {"label": [*"ABCDE"], "text": [*FOUR, "v"]},
            "answerKey": "E",
        },
        f"Q?\n{LINES}\nE. v",
        "E",
    ),
    "hidden answer": (
        {"question": "Q?", "choices": {"label": ["A", "B"], "text": ["x", "y"]}, "answerKey": ""},
        "Q?\nA. x\nB. y",
        None,
    ),
    "HellaSwag": (
        {"ind": 4, "ctx_a": "A man", "ctx_b": "sits.", "ctx": "A man sits.", "endings": FOUR, "label": "3"},
        f"A man sits.\n{LINES}",
        "D",
    ),
    "WinoGrande": (
        {"sentence": "Sarah, not Maria, as _ is", "option1": "Sarah", "option2": "Maria", "answer": "2"},
        "Sarah, not Maria, as _ is\nA. Sarah\nB. Maria",
        "B",
    ),
    "WinoGrande's test": (
        {"sentence": "As _ is", "option1": "Sarah", "option2": "Maria", "answer": ""},
        "As _ is\nA. Sarah\nB. Maria",
        None,
    ),
    "PIQA": ({"goal": "G", "sol1": "x", "sol2": "y", "label": 1}, "G\nA. x\nB. y", "B"),
    "PIQA's test": ({"goal": "G", "sol1": "x", "sol2": "y", "label": -1}, "G\nA. x\nB. y", None),
    "COPA": (
        {"premise": "It fell.", "choice1": "x", "choice2": "y", "question": "cause", "idx": 0, "label": 0},
        "It fell.\n\ncause\nA. x\nB. y",
        "A",
    ),
    "Social IQa": (
        {"context": "C.", "question": "Q?", "answerA": "x", "answerB": "y", "answerC": "z", "label": "2"},
        "C.\n\nQ?\nA. x\nB. y\nC. z",
        "B",
    ),
    "Cosmos QA": (
        {"context": "C.", "question": "Q?", "answer0": "x", "answer1": "y", "answer2": "z", "answer3": "w", "label": 3},
        f"C.\n\nQ?\n{LINES}",
        "D",
    ),
    "MedMCQA": (
        {"id": "u", "question": "Q?", "opa": "x", "opb": "y", "opc": "z", "opd": "w", "cop": 0, "exp": "since"},
        f"Q?\n{LINES}",
        "A",
    ),
    "MedQA": (
        {"question": "Q?", "answer": "y", "options": {"A": "x", "B": "y"}, "answer_idx": "B"},
        "Q?\nA. x\nB. y",
        "y",
    ),
    "a dictionary of Arrow, some labels without text": (
        {"question": "Q?", "options": {"A": "x", "B": "y", "C": None}, "answer_idx": "B"},
        "Q?\nA. x\nB. y",
        "B",
    ),
    "RACE": (
        {"example_id": "h1", "article": "Text.", "question": "Q?", "options": FOUR, "answer": "C"},
        f"Text.\n\nQ?\n{LINES}",
        "C",
    ),
    "ReClor": ({"context": "C.", "question": "Q?", "answers": FOUR, "label": 2}, f"C.\n\nQ?\n{LINES}", "C"),
    "QuAIL": ({"context": "C.", "question": "Q?", "answers": FOUR, "correct_answer_id": 0}, f"C.\n\nQ?\n{LINES}", "A"),
    "LogiQA": (
        {"context": "C.", "query": "Q?", "options": FOUR, "correct_option": 1},
        f"C.\n\nQ?\n{LINES}",
        "B",
    ),
    "LogiQA with letters": (
        {"label": "c", "context": "C.", "question": "Q?", "options": FOUR},
        f"C.\n\nQ?\n{LINES}",
        "C",
    ),
    "DREAM": (
        {"dialogue": ["M: Hi.", "W: Bye."], "question": "Q?", "choice": ["x", "y", "z"], "answer": "y"},
        "M: Hi.\nW: Bye.\n\nQ?\nA. x\nB. y\nC. z",
        "y",
    ),
    "options as objects": (
        {"question": "Q?", "options": [{"key": "A", "value": "x"}, {"key": "B", "value": "y"}], "answer_idx": "B"},
        "Q?\nA. x\nB. y",
        "B",
    ),
    "options as objects in another order": (
        {"question": "Q?", "options": [{"label": "B", "text": "y"}, {"label": "A", "text": "x"}], "answer": "A"},
        "Q?\nB. y\nA. x",
        "A",
    ),
    "QuALITY": ({"article": "Text.", "question": "Q?", "options": FOUR, "gold_label": 4}, f"Text.\n\nQ?\n{LINES}", "D"),
    "the line of an option": ({"question": "Q?", "A": "x", "B": "y", "answer": "B. y"}, "Q?\nA. x\nB. y", "B"),
    "the column of an option": ({"question": "Q?", "opa": "x", "opb": "y", "answer": "opb"}, "Q?\nA. x\nB. y", "B"),
    "a number that pandas wrote": ({"question": "Q?", "A": "x", "B": "y", "answer": "0.0"}, "Q?\nA. x\nB. y", "A"),
    "a number that is an option": (
        {"question": "Q?", "A": "1.0", "B": "y", "answer": "1.0"},
        "Q?\nA. 1.0\nB. y",
        "1.0",
    ),
    "option_a": (
        {"question": "Q?", "option_a": "x", "option_b": "y", "correct_option": "B"},
        "Q?\nA. x\nB. y",
        "B",
    ),
    "Option 1": ({"Question": "Q?", "Option 1": "x", "Option 2": "y", "Answer": 1}, "Q?\nA. x\nB. y", "A"),
    "letter in brackets": ({"question": "Q?", "options": FOUR, "answer": "(c)"}, f"Q?\n{LINES}", "C"),
    "letter and option": ({"question": "Q?", "options": ["B", "A"], "answer": "A"}, "Q?\nA. B\nB. A", "A"),
    "option that is a negative number": (
        {"question": "Q?", "options": ["-1", "2"], "answer": -1},
        "Q?\nA. -1\nB. 2",
        "-1",
    ),
    "option that is a letter": ({"question": "Q?", "options": ["b", "a"], "answer": "a"}, "Q?\nA. b\nB. a", "a"),
    "several right ones": ({"question": "Q?", "options": FOUR, "answer": ["A", "C"]}, f"Q?\n{LINES}", "A, C"),
    "answer that is no number of an option": (
        {"question": "2+2?", "options": ["3", "4", "22"], "answer": 22},
        "2+2?\nA. 3\nB. 4\nC. 22",
        "22",
    ),
    "answer as text that is an option": (
        {"question": "1+1?", "options": ["1", "2", "3"], "answer": "2"},
        "1+1?\nA. 1\nB. 2\nC. 3",
        "2",
    ),
    "options in brackets in the question": (
        {"question": "Q? (A) x (B) y", "options": ["x", "y"], "answer": "B"},
        "Q? (A) x (B) y",
        "B",
    ),
    "options as JSON in a CSV": ({"question": "Q?", "options": '["x", "y"]', "answer": "1"}, "Q?\nA. x\nB. y", "B"),
    "options as Python in a CSV": ({"question": "Q?", "options": "['x', 'y']", "answer": "1"}, "Q?\nA. x\nB. y", "B"),
    "options in one text": ({"Problem": "Q?", "options": "a ) 1 , b ) 2", "correct": "a"}, "Q?\na ) 1 , b ) 2", "a"),
    # The order of these options would be ours: the questions are asked openly.
    "SciQ": (
        {"question": "Q?", "distractor1": "x", "distractor2": "y", "correct_answer": "w", "support": "S."},
        "S.\n\nQ?",
        "w",
    ),
    "GPQA": (
        {"Question": "Q?", "Correct Answer": "w", "Incorrect Answer 1": "x", "Incorrect Answer 2": "y", "Notes": "E"},
        "Q?",
        "w",
    ),
    "TruthfulQA": (
        {"type": "t", "question": "Q?", "best_answer": "b", "correct_answers": ["b", "c"], "incorrect_answers": ["x"]},
        "Q?",
        "b",
    ),
    "TruthfulQA's targets": (
        {"question": "Q?", "mc1_targets": {"choices": ["x", "b"], "labels": [0, 1]}, "mc2_targets": {}},
        "Q?",
        "b",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("row", "question", "answer"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layout(tmp_path: Path, row: dict[str, Any], question: str, answer: str | None) -> None:
    (example,) = read(tmp_path, row)
    assert (example.question, example.answer) == (question, answer)


def medmcqa(*numbers: int | str) -> list[dict[str, Any]]:
    return [
        {"question": f"{i}?", "opa": "x", "opb": "y", "opc": "z", "opd": "w", "cop": n} for i, n in enumerate(numbers)
    ]


def test_a_zero_shows_that_options_count_from_0_and_the_last_number_that_they_count_from_1(tmp_path: Path) -> None:
    assert [example.answer for example in read(tmp_path, *medmcqa(1, 0, 3))] == ["B", "A", "D"]
    assert [example.answer for example in read(tmp_path, *medmcqa(1, 4, 3))] == ["A", "D", "C"]
    assert [example.answer for example in read(tmp_path, *medmcqa("1", "4"))] == ["A", "D"]
    with pytest.raises(
        InputError, match=r"row 2 has the answer 0 in 'cop', and .*row 3 the answer 4 .*: write letters"
    ):
        read(tmp_path, *medmcqa(1, 0, 4))
    winogrande = {"sentence": "As _ is", "option1": "x", "option2": "y"}
    assert [one.answer for one in read(tmp_path, *(winogrande | {"answer": n} for n in "01"))] == ["A", "B"]


def test_numbers_that_no_row_settles_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in medmcqa(1, 2)))
    examples, rows = read_examples(origin_of(path, "train", "train"))
    assert [example.answer for example in examples] == ["B", "C"]
    assert rows.notes == [
        "the answers in 'cop' are taken to count the options from 0, though no row shows it: write letters if they do "
        "not"
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in medmcqa(0, 2)))
    assert read_examples(origin_of(path, "train", "train"))[1].notes == []


def test_numbers_are_texts_of_options_where_one_can_be_nothing_else(tmp_path: Path) -> None:
    rows = [{"question": "3+1?", "options": ["3", "4", "5"], "answer": 4}]
    rows += [{"question": "1+1?", "options": ["2", "1", "3"], "answer": 2}]
    assert [example.answer for example in read(tmp_path, *rows)] == ["4", "2"]
    # Here the first row can only be a number: that of MMLU's second is one too, though "2" is an option.
    rows = [{"question": "3+1?", "choices": ["3", "4", "5"], "answer": 1}]
    rows += [{"question": "1+1?", "choices": ["2", "1", "3"], "answer": 2}]
    assert [example.answer for example in read(tmp_path, *rows)] == ["B", "C"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "Q?", "options": ["x", "y"], "answer": "E"}, "the answer 'E' in 'answer', but the options A, B"),
        ({"question": "Q?", "choices": ["x", "y"], "answer": 7}, "the answer 7 in 'answer', but 2 options"),
        ({"question": "Q?", "options": ["x", "y"], "answer": [0, 1]}, "several numbers of options in 'answer'"),
        ({"question": "Q?", "opa": "x", "opb": "", "opc": "z", "cop": 0}, "an empty option in 'opb'"),
        ({"question": "Q?", "choices": ["x", None, "y"], "answer": 0}, "an empty option in 'choices'"),
        ({"question": "Q?", "choices": [None, None], "answer": 0}, "an empty option in 'choices'"),
        (
            {"question": "Q?", "choices": [{"image": "a"}, {"image": "b"}], "answer": 0},
            "an option in 'choices' that is no text",
        ),
    ],
)
def test_an_answer_that_is_no_option_leaves_the_row_out(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    good = {"question": "R?", "options": ["x", "y"], "answer": "A"}
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(good)}\n{json.dumps(row)}\n")
    examples, rows = read_examples(origin_of(path, "train", "train"))
    assert [example.answer for example in examples] == ["A"]
    assert rows.left_out == {reason: 1}
    with pytest.raises(InputError, match=f"a.jsonl: row 2 has {reason}; "):
        read_examples(origin_of(path, "train", "train"), strict=True)


def test_options_as_numpy_prints_them_into_a_csv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    printed = str(np.array(["x", "y", "it's z"], dtype=object))
    struct = str({"text": np.array(["x", "y"], dtype=object), "label": np.array(["1", "2"])})
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([["question", "choices", "answer"], ["Q?", printed, 0], ["R?", struct, 2]])
    mmlu, arc = load_examples(path)
    assert (mmlu.question, mmlu.answer) == ("Q?\nA. x\nB. y\nC. it's z", "A")
    assert (arc.question, arc.answer) == ("R?\n1. x\n2. y", "2")
    path.write_text("question,choices,answer\nQ?,\"['x', 'y'\",0\n")
    with pytest.raises(
        InputError, match="row 1 has a text in 'choices' that is no list of options; write them as JSON"
    ):
        load_examples(path)


def test_columns_of_options_and_unread_ones_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(LAYOUTS["GPQA"][0]) + "\n")
    assert str(read_examples(origin_of(path, "train", "train"))[1].columns) == (
        "question from Question, answer from Correct Answer; not read: Incorrect Answer 1, Incorrect Answer 2, Notes"
    )
    path.write_text(json.dumps(LAYOUTS["MedMCQA"][0]) + "\n")
    assert str(read_examples(origin_of(path, "train", "train"))[1].columns) == (
        "id from id, question from question, options from opa, opb, opc, opd, answer from cop; not read: exp"
    )
