"""Rows of questions and answers, from shared material, from installed packages and from generators.

A row is a JSON object: `question`, `answer`, and for multiple choice `options`, whose letter is the answer. Given the
same files and the same versions of the packages, every function returns the same rows in the same order.
"""

from __future__ import annotations

import ast
import csv
import gzip
import importlib
import io
import json
import random
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]

ASSETS = Path(__file__).parents[3] / "shared" / "assets" / "data"
LETTERS = "ABCDEFGHIJ"
GUIDELINES = re.compile(r"\n(?:When performing calculations|In solving equations|Please follow the instruction)")


def asked(row: Row) -> str:
    """The question as the model gets it, options a line each."""
    question: str = row["question"].strip()
    lines = [f"{letter}. {text.strip()}" for letter, text in zip(LETTERS, row.get("options", ()), strict=False)]
    return "\n".join([question, *lines])


def _json_lines(name: str) -> list[Any]:
    path = ASSETS / name
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def gsm8k(part: str) -> list[Row]:
    return [{"question": row["question"], "answer": row["answer"]} for row in _json_lines(f"gsm8k/{part}.jsonl")]


def math500() -> list[Row]:
    return [{"question": row["Question"], "answer": row["solution"]} for row in _json_lines("math500/MATH500.jsonl")]


def olympiad() -> list[Row]:
    rows = _json_lines("limo_eval/olympiadbench.jsonl")
    return [{"question": row["question"], "answer": str(row["answer"])} for row in rows]


def thoughts(name: str) -> list[Row]:
    """Prompts and the long thoughts of a tuned model, cut at the end of a sentence after some 75 words."""
    rows = []
    for row in _json_lines(f"unireason/UniReason-SFT_{name}.jsonl"):
        question = row["input"].split("<|im_start|>user\n", 1)[1].split("<|im_end|>")[0]
        rows.append({"question": question, "answer": _first_sentences(row["output"], 75)})
    return rows


def coqa() -> list[Row]:
    """A passage's first words, a question on it and its short answer."""
    rows = []
    for row in _json_lines("unireason/UniReason-RL_coqa.jsonl"):
        text = row["input"].split("<|im_start|>user\n", 1)[1].split("<|im_end|>")[0]
        story, _, dialogue = text.partition("\n\nQ: ")
        question, _, answer = dialogue.partition("\n\nA:")
        answer = answer.split("\n\nQ:")[0].strip()
        if not question or not answer:
            continue
        passage = " ".join(story.split()[:90])
        rows.append({"question": f"{passage} ...\n\nQuestion: {question.strip()}", "answer": answer})
    return rows


def pubmedqa() -> list[Row]:
    rows = json.loads((ASSETS / "pubmedqa" / "ori_pqal.json").read_text(encoding="utf-8"))
    return [
        {"question": row["QUESTION"], "answer": row["LONG_ANSWER"], "text": " ".join(row["CONTEXTS"])}
        for row in rows.values()
    ]


def humaneval() -> list[Row]:
    rows = _json_lines("humaneval/HumanEval.jsonl.gz")
    return [
        {
            "question": f"Complete this Python function.\n{row['prompt'].strip()}",
            "answer": row["canonical_solution"].rstrip(),
        }
        for row in rows
    ]


def stories() -> list[str]:
    text = (ASSETS / "tinystories" / "tinystories_train_head_2MiB.txt").read_text(encoding="utf-8")
    return [story.strip() for story in text.split("<|endoftext|>") if len(story.split()) >= 60]


def mmlu() -> dict[str, list[Row]]:
    """Subject -> rows, test questions first."""
    subjects: dict[str, list[Row]] = {}
    with zipfile.ZipFile(ASSETS / "mmlu" / "mmlu.zip") as archive:
        for part in ("test", "val", "dev"):
            for name in sorted(archive.namelist()):
                if not name.endswith(f"_{part}.csv"):
                    continue
                subject = Path(name).name.removesuffix(f"_{part}.csv").replace("_", " ")
                for row in csv.reader(io.StringIO(archive.read(name).decode("utf-8"))):
                    if len(row) == 6 and row[5] in LETTERS:
                        chosen = {"question": row[0], "options": row[1:5], "answer": row[5]}
                        subjects.setdefault(subject, []).append(chosen)
    return subjects


def answered_in_words(rows: list[Row]) -> list[Row]:
    """Questions that make sense without their options, with the right option's text as the answer."""
    return [
        {"question": row["question"], "answer": row["options"][LETTERS.index(row["answer"])]}
        for row in rows
        if "?" in row["question"] and "following" not in row["question"] and "_" not in row["question"]
    ]


def mmlu_pro() -> dict[str, list[Row]]:
    """Category -> rows."""
    import pyarrow.parquet as pq

    categories: dict[str, list[Row]] = {}
    for row in pq.read_table(ASSETS / "mmlu_pro" / "test-00000-of-00001.parquet").to_pylist():
        chosen = {"question": row["question"], "options": list(row["options"]), "answer": row["answer"]}
        categories.setdefault(row["category"], []).append(chosen)
    return categories


def chains_of_thought() -> list[Row]:
    """MMLU-Pro's worked examples: all 70 that there are."""
    return [
        {
            "question": asked({"question": row["question"], "options": row["options"]}),
            "answer": row["cot_content"].removeprefix("A: "),
        }
        for row in _json_lines("mmlu_pro/validation_cot70.jsonl")
    ]


def functions(package: str) -> list[Row]:
    """Functions of a Python package: signature and the first paragraph of the docstring, then the body."""
    rows = []
    for name, function, lines in _documented_functions(package):
        paragraph = " ".join(str(ast.get_docstring(function)).split("\n\n")[0].split())
        body = lines[function.body[1].lineno - 1 : function.end_lineno]
        if name.startswith("_") or not 3 <= len(body) <= 14 or not 4 <= len(paragraph.split()) <= 40:
            continue
        head = lines[function.lineno - 1 : function.body[0].lineno - 1]
        margin = " " * function.col_offset
        signature = "\n".join(line.removeprefix(margin) for line in head)
        body_text = "\n".join(line.removeprefix(margin) for line in body)
        question = f'Complete this Python function.\n{signature}\n    """{paragraph}"""'
        rows.append({"question": question, "answer": body_text.rstrip()})
    return rows


def documentation(package: str) -> list[str]:
    """Docstrings of at least 60 words: English prose about software."""
    texts = (str(ast.get_docstring(function)) for _, function, _ in _documented_functions(package))
    return [text for text in texts if len(text.split()) >= 60 and ">>>" not in text]


def source_code(package: str) -> list[str]:
    """Modules of a Python package, 40 lines from their middle."""
    texts = []
    for path in _modules(package):
        lines = path.read_text(encoding="utf-8").splitlines()
        if len(lines) >= 120:
            texts.append("\n".join(lines[len(lines) // 2 : len(lines) // 2 + 40]).strip("\n"))
    return texts


def _documented_functions(package: str) -> Iterator[tuple[str, ast.FunctionDef, list[str]]]:
    for path in _modules(package):
        text = path.read_text(encoding="utf-8")
        try:
            tree = ast.parse(text)
        except SyntaxError:
            continue
        lines = text.splitlines()
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and len(node.body) > 1 and ast.get_docstring(node):
                yield node.name, node, lines


def _modules(package: str) -> list[Path]:
    file = importlib.import_module(package).__file__
    root = Path(str(file)).parent
    return [path for path in sorted(root.rglob("*.py")) if "test" not in str(path.relative_to(root))]


def translation(language: str, name: str) -> list[Row]:
    """Names of places, languages and currencies, from English; what is spelt alike is left out."""
    from babel import Locale

    english, other = Locale("en"), Locale(language)
    rows = []
    for table in ("territories", "languages", "currencies"):
        names, translated = getattr(english, table), getattr(other, table)
        for code in sorted(set(names) & set(translated)):
            if names[code].lower() != translated[code].lower():
                rows.append({"question": f"Translate into {name}: {names[code]}", "answer": translated[code]})
    return rows


def generated(generator: str, n: int, seed: int) -> list[Row]:
    """Rows of a generator of reasoning-gym, without the pages of guidelines that some append."""
    import reasoning_gym

    dataset = reasoning_gym.create_dataset(generator, size=n, seed=seed)
    return [{"question": GUIDELINES.split(entry["question"])[0], "answer": str(entry["answer"])} for entry in dataset]


def continued(texts: list[str], asks: str, words: tuple[int, int]) -> list[Row]:
    """The first words of a text as the question, the words after them as the answer, line breaks kept."""
    rows = []
    first, then = words
    for text in texts:
        pieces = re.findall(r"\S+\s*", text)
        if len(pieces) >= first + then:
            start, rest = "".join(pieces[:first]).rstrip(), "".join(pieces[first : first + then]).rstrip()
            rows.append({"question": f"{asks}\n{start}", "answer": rest})
    return rows


def _first_sentences(text: str, words: int) -> str:
    taken = ""
    for sentence in re.findall(r".+?(?:[.!?](?=\s)|$)\s*", text, flags=re.DOTALL):
        taken += sentence
        if len(taken.split()) >= words:
            break
    return taken.strip()


def shuffled(rows: list[Any], seed: str) -> list[Any]:
    """The rows in an order drawn from `seed` alone."""
    mixed = list(rows)
    random.Random(seed).shuffle(mixed)
    return mixed
