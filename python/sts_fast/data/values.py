"""Values of rows: what kind they are, and their text."""

from __future__ import annotations

import ast
import json
import math
import re
from typing import Any

from sts_fast.data.tables import Row
from sts_fast.errors import InputError, UnusableRow

# KTO's labels, in the spellings of files.
GOOD = ("true", "1", "1.0", "+1", "yes", "y", "t", "good", "desirable", "desired", "chosen", "positive", "👍")
BAD = ("false", "0", "0.0", "-1", "no", "n", "f", "bad", "undesirable", "undesired", "rejected", "negative", "👎")


# Arrays as NumPy prints them: in a struct, and alone.
_ARRAY = re.compile(r"array\((\[.*?\])(?:,\s*dtype=[^)]*)?\)", re.DOTALL)
_QUOTED = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_PRINTED = re.compile(rf"\[\s*{_QUOTED}(?:\s+{_QUOTED})*\s*\]")

ABSENT = object()


def encodable(value: object, where: str, name: str) -> str:
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UnusableRow(where, f"half a character (a lone surrogate) in {name!r}", "remove it") from error
    return text


def kind_of(value: Any) -> str:
    if value is None:
        return "empty"
    return {dict: "an object", list: "a list", str: "a text", bool: "a truth value"}.get(type(value), "a number")


def is_missing(value: Any) -> bool:
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def parsed(value: Any) -> Any:
    """The list or object that a CSV holds as JSON, as Python writes it, or as NumPy does; anything else as it is."""
    text = value.strip() if isinstance(value, str) else ""
    if not text.startswith(("[", "{")):
        return value
    if _PRINTED.fullmatch(text):
        return [ast.literal_eval(quoted) for quoted in re.findall(_QUOTED, text)]
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(text if read is json.loads else _ARRAY.sub(r"\1", text))
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, (dict, list)):
            return found
    return value


def is_structure(value: Any) -> bool:
    """True of a text that begins as a list or an object of texts does."""
    return isinstance(value, str) and re.match(r"\s*[\[{]\s*['\"]", value) is not None


def is_good(value: Any, where: str, column: str) -> bool:
    """Whether a label says that a reply is a good one.

    Raises UnusableRow where it is empty, InputError where it says something else.
    """
    if is_missing(value):
        raise UnusableRow(where, f"no {column} that says whether its reply is good", "fill it in or drop the column")
    text = str(value).strip().lower()
    if text not in (*GOOD, *BAD):
        raise InputError(
            f"{where} has the {column} {value!r}, which does not say whether its reply is a good one: write true or "
            "false, or rename the column if it is about something else"
        )
    return text in GOOD


def passage_text(value: Any) -> str | None:
    """Text of a passage; None of a structure that is not known.

    Known are a text, a list of paragraphs or sentences, PubMedQA's {"contexts": [...]}, and titled paragraphs:
    HotpotQA's {"title": [...], "sentences": [[...], ...]} or [[title, [sentence, ...]], ...], and lists of
    {"title": ..., "text": ...}.
    """
    if isinstance(value, str):
        return value.strip() or None
    if isinstance(value, dict):
        titles, sentences = value.get("title"), value.get("sentences")
        if isinstance(titles, list) and isinstance(sentences, list) and len(titles) == len(sentences):
            return passage_text([[title, texts] for title, texts in zip(titles, sentences, strict=True)])
        keys = ("contexts", "paragraph_text", "passage_text", "paragraphs", "text", "passage", "content")
        text = next((text for key in keys if (text := passage_text(value.get(key))) is not None), None)
        title = value.get("title")
        return f"{title.strip()}\n{text}" if text is not None and is_text(title) else text  # type: ignore[union-attr]
    if not isinstance(value, list) or not value:
        return None
    if all(isinstance(item, str) for item in value):
        return "\n".join(item.strip() for item in value if item.strip()) or None
    if all(isinstance(item, (list, tuple)) and len(item) == 2 and isinstance(item[0], str) for item in value):
        parts = [f"{title.strip()}\n{_joined(texts)}" for title, texts in value]
        return "\n\n".join(parts)
    parts = [text for item in value if isinstance(item, dict) and (text := passage_text(item)) is not None]
    return "\n\n".join(parts) if len(parts) == len(value) else None


def _joined(sentences: Any) -> str:
    if isinstance(sentences, str):
        return sentences.strip()
    return " ".join(str(sentence).strip() for sentence in sentences) if isinstance(sentences, list) else ""


def answer_value(value: Any) -> Any:
    """The answer in the structures that data sets put it in: a text or a number; None where they give none.

    Of several right answers the first, or the best scored; a truth value is yes or no; DROP's spans are all of one
    answer. A structure that is not known is returned as it is.
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        first = next((item for item in value if not is_missing(item)), None)
        return answer_value(first)
    if not isinstance(value, dict):
        return value
    texts, scores = value.get("text"), value.get("score")
    if isinstance(texts, list) and isinstance(scores, list) and texts and len(texts) == len(scores):
        return texts[max(range(len(texts)), key=lambda i: scores[i] if isinstance(scores[i], (int, float)) else 0)]
    choices, labels = value.get("choices"), value.get("labels")
    if isinstance(choices, list) and isinstance(labels, list):  # TruthfulQA's targets
        return next((choice for choice, label in zip(choices, labels, strict=False) if label == 1), None)
    if {"number", "spans", "date"} <= value.keys():
        spans = value["spans"] if isinstance(value["spans"], list) else []
        date = value["date"] if isinstance(value["date"], dict) else {}
        written = " ".join(str(date[part]) for part in ("day", "month", "year") if not is_missing(date.get(part)))
        return value["number"] if not is_missing(value["number"]) else ", ".join(map(str, spans)) or written or None
    key = next((key for key in ("value", "text", "texts", "input_text", "spans", "answer") if key in value), None)
    return value if key is None else answer_value(value[key])


def each_answer(value: Any) -> list[Any]:
    """Answers to a list of questions: a list, or CoQA's {"input_text": [...]} and the like."""
    if isinstance(value, dict):
        value = next((value[key] for key in ("input_text", "texts", "text") if isinstance(value.get(key), list)), None)
    return [answer_value(item) for item in value] if isinstance(value, list) else []


def lookup(row: Row, field: str) -> Any:
    """A column, or a field inside a struct column by dotted name; `ABSENT` where there is none."""
    value: Any = row
    if field in row:
        return row[field]
    for part in field.split("."):
        if not isinstance(value, dict) or part not in value:
            return ABSENT
        value = value[part]
    return value


def without_margin(text: str) -> str:
    """Without blank lines around it; code keeps the indentation of its first line."""
    text = re.sub(r"\A(?:[^\S\n]*\n)+", "", text).rstrip()
    return text[1:] if re.match(r" \S", text) else text


def words_of(text: str) -> str:
    """The text with one blank between words."""
    return " ".join(text.split())
