"""Answers per question of MMLU-Pro's own scripts, and their summaries."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from sts_fast.errors import InputError
from sts_fast.files import Document
from sts_fast.outcomes.evaluation import Evaluation, Result, Task, finite, read_text

# The scripts' first and strictest pattern (compute_accuracy.py, level l1); answers that it does not match are wrong.
ANSWER = re.compile(r"answer is \(?([A-J])\)?")
SUMMARY_LINE = re.compile(r"^Average accuracy (\S+) - (.+)$", re.MULTILINE)


def recognises(document: Any) -> bool:
    return has_rows(document) or (
        isinstance(document, dict) and any(isinstance(entry, dict) and "corr" in entry for entry in document.values())
    )


def read(path: Path, document: Any) -> Evaluation:
    return read_rows(path, document) if has_rows(document) else read_summary(path, document)


def has_rows(document: Any) -> bool:
    return (
        isinstance(document, list)
        and len(document) > 0
        and all(isinstance(row, dict) and {"question_id", "answer", "category"} <= set(row) for row in document)
    )


def read_rows(path: Path, rows: list[Document]) -> Evaluation:
    """Answers per question. Where no answer can be read, the scripts guess; here the answer counts as wrong."""
    correct: dict[str, dict[str, float]] = {}
    key: dict[str, dict[str, str]] = {}
    unparsed: dict[str, int] = {}
    for row in rows:
        category, question = str(row["category"]), str(row["question_id"])
        text = row.get("model_outputs", row.get("generated_text"))
        if isinstance(text, list):
            text = text[0] if text else None
        if "model_outputs" not in row and "generated_text" not in row:
            raise InputError(f"{path}: question {question} has neither model_outputs nor generated_text to read again")
        match = ANSWER.search(text) if isinstance(text, str) else None
        if question in correct.setdefault(category, {}):
            raise InputError(f"{path} contains question {question} twice: give one evaluation")
        correct[category][question] = float(match is not None and match[1] == row["answer"])
        key.setdefault(category, {})[question] = f"{row['answer']} {row.get('question', '')}"
        unparsed[category] = unparsed.get(category, 0) + (match is None)
    evaluation = Evaluation()
    for category, answers in correct.items():
        n, value = len(answers), sum(answers.values()) / len(answers)
        result = Result(
            value, "accuracy", _stderr(value, n), n, answers, key[category],
            unparsed=unparsed[category] / n, percent=False,
        )  # fmt: skip
        evaluation.tasks[category] = Task({"accuracy": result})
    return evaluation


def read_summary(path: Path, document: Document) -> Evaluation:
    evaluation = Evaluation(warnings=[_guessed(path)])
    for name, entry in document.items():
        right, wrong = (finite(entry.get(k)) if isinstance(entry, dict) else None for k in ("corr", "wrong"))
        if right is None or wrong is None or right < 0 or wrong < 0 or right + wrong == 0:
            raise InputError(f"{path}: {name} does not give the numbers of right and wrong answers")
        if name != "total":
            n = round(right + wrong)
            result = Result(right / n, "accuracy", _stderr(right / n, n), n, percent=False)
            evaluation.tasks[name] = Task({"accuracy": result})
    return evaluation


def read_text_summary(path: Path) -> Evaluation:
    evaluation = Evaluation(warnings=[_guessed(path)])
    for value, name in SUMMARY_LINE.findall(read_text(path)):
        try:
            accuracy = finite(float(value))
        except ValueError:
            accuracy = None
        if accuracy is None:
            raise InputError(f"{path}: the accuracy of {name} is '{value}', not a number")
        evaluation.tasks[name.strip()] = Task({"accuracy": Result(accuracy, "accuracy")})
    if not evaluation.tasks:
        raise InputError(f"{path} has no line 'Average accuracy 0.1234 - domain' of an MMLU-Pro summary")
    return evaluation


def _guessed(path: Path) -> str:
    return (
        f"{path} is a summary, in which MMLU-Pro's scripts count a random guess where they cannot read an answer: "
        "give their JSON per question"
    )


def _stderr(share: float, n: int) -> float | None:
    """sd / sqrt(n) of n zeros and ones, with ddof 1 as in lm-evaluation-harness."""
    return math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else None
