"""Options of multiple-choice questions, in every layout of columns, and the option that a row names as its answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from sts_fast.data.tables import Row
from sts_fast.data.values import encodable, is_missing, is_structure, is_text, parsed
from sts_fast.errors import InputError, UnusableRow, listed

LIST_COLUMNS = ("options", "choices", "endings", "choice", "answer_choices", "answer_options")
# Columns that name one of the options, and nothing else.
INDEX_COLUMNS = (
    *("answerkey", "answer_key", "answer_idx", "answer_index", "answer_id"),
    *("correct_option", "correct_choice", "correct_answer_id", "correct_answer_idx", "correct_index", "correct_idx"),
    *("correct", "cop", "gold", "gold_index", "gold_label", "label"),
)
# Those among them that count from 0 even where the options are in numbered columns.
CLASS_COLUMNS = ("label", "cop", "answer_idx", "answer_index", "correct_index", "correct_idx", "gold", "gold_index")

# One column for each option: `opa`, `option_a`, `choice1`, `ending0`, `sol1`, or a letter alone.
_OPTION_COLUMN = re.compile(r"(options?|choices?|opt?|ending|sol)_?([a-j]|\d{1,2})")
_LETTER_COLUMN = re.compile(r"()([a-j])")
# These may be several answers too: they are options where another column names one of them.
_ANSWER_COLUMN = re.compile(r"(answer|ans)_?([a-j]|\d{1,2})")
# Of an option that is an object.
_TEXT_KEYS, _LABEL_KEYS = ("text", "content", "value", "option"), ("label", "key")
_NAMED_OPTION = re.compile(r"\(?([A-Za-z]|-?\d{1,2})[).:]?")


@dataclass(frozen=True)
class Choices:
    """Options of one question.

    columns: that they are read from
    labels:  [n] of each option: A, B, ... or the data set's own; none where the options are one text
    texts:   [n] without their labels
    lines:   as they are shown, in order
    first:   number of the first option in the data set's definition, where it numbers them
    classes: the same in CLASS_COLUMNS
    """

    columns: tuple[str, ...]
    labels: tuple[str, ...]
    texts: tuple[str, ...]
    lines: tuple[str, ...]
    first: int = 0
    classes: int = 0

    @classmethod
    def of(cls, fields: Row, where: str) -> Choices | None:
        """Options of a row, by its columns in canonical spelling; None where it has none.

        Raises InputError where a column of options holds something else.
        """
        has_index = any(not is_missing(fields.get(name)) for name in INDEX_COLUMNS)
        lists = (*LIST_COLUMNS, *(["answers"] if has_index and _is_list_of_options(fields.get("answers")) else ()))
        name = next((name for name in lists if not is_missing(fields.get(name))), None)
        if name is not None:
            return cls._of_value(fields[name], name, where)
        patterns = [_OPTION_COLUMN, _LETTER_COLUMN, *([_ANSWER_COLUMN] if has_index else [])]
        return next((found for pattern in patterns if (found := cls._of_columns(fields, pattern, where))), None)

    @classmethod
    def _of_value(cls, options: Any, name: str, where: str) -> Choices:
        """Of a list, of {label: text}, of {"label": [...], "text": [...]}, or of one text."""
        options = parsed(options)
        if is_structure(options):
            raise UnusableRow(where, f"a text in {name!r} that is no list of options", "write them as JSON")
        if isinstance(options, dict) and all(isinstance(options.get(key), list) for key in ("text", "label")):
            options = dict(zip(options["label"], options["text"], strict=False))
        if isinstance(options, list) and all(isinstance(option, dict) for option in options):
            texts = [next((option[key] for key in _TEXT_KEYS if key in option), option) for option in options]
            labels = [
                next((option[key] for key in _LABEL_KEYS if is_text(option.get(key))), None) for option in options
            ]
            options = dict(zip(labels, texts, strict=True)) if all(labels) else texts
        if isinstance(options, dict):
            given = {str(label).strip(): text for label, text in options.items() if not is_missing(text)}
            if not any(isinstance(text, (dict, list)) for text in given.values()):
                return cls._labelled([name], [*given], [_text(text, where, name) for text in given.values()])
        if isinstance(options, str):
            return cls((name,), (), (), (options.strip(),))
        if not isinstance(options, list) or len(options) > len(ascii_uppercase):
            raise UnusableRow(where, f"options in {name!r} that are not a list of at most 26", "correct it")
        while options and is_missing(options[-1]):
            options = options[:-1]
        if not options or any(is_missing(option) for option in options):
            raise UnusableRow(where, f"an empty option in {name!r}", "fill it in")
        if any(isinstance(option, (dict, list)) for option in options):
            raise UnusableRow(where, f"an option in {name!r} that is no text", "write it as text")
        texts = [_text(text, where, name) for text in options]
        own = [re.match(rf"\(?{letter}[).:]\s*", text) for letter, text in zip(ascii_uppercase, texts, strict=False)]
        if all(own):
            bare = [text[mark.end() :] for mark, text in zip(own, texts, strict=True) if mark]
            return cls((name,), tuple(ascii_uppercase[: len(texts)]), tuple(bare), tuple(texts))
        return cls._labelled([name], [*ascii_uppercase[: len(texts)]], texts)

    @classmethod
    def _of_columns(cls, fields: Row, pattern: re.Pattern[str], where: str) -> Choices | None:
        families: dict[str, dict[int, str]] = {}
        for name in fields:
            if match := pattern.fullmatch(name):
                kind = "letters" if match[2].isalpha() else "numbers"
                at = ord(match[2]) - ord("a") if match[2].isalpha() else int(match[2])
                families.setdefault(f"{match[1]} {kind}", {})[at] = name
        for family, columns in families.items():
            first = min(columns)
            names = [columns[at] for at in range(first, first + len(columns)) if at in columns]
            while names and is_missing(fields[names[-1]]):
                names.pop()
            values = [fields[name] for name in names]
            if len(names) < 2 or first > 1 or any(isinstance(value, (list, dict)) for value in values):
                continue
            if empty := next((name for name, value in zip(names, values, strict=True) if is_missing(value)), None):
                raise UnusableRow(where, f"an empty option in {empty!r}", "fill it in")
            texts = [_text(value, where, name) for name, value in zip(names, values, strict=True)]
            numbered = first if family.endswith("numbers") else 0
            # Social IQa calls answerA 1 in `label`; the `label` of other data sets counts from 0.
            classes = 1 if family == "answer letters" else 0
            return cls._labelled(names, [*ascii_uppercase[: len(texts)]], texts, numbered, classes)
        return None

    @classmethod
    def _labelled(
        cls, columns: Sequence[str], labels: Sequence[str], texts: Sequence[str], first: int = 0, classes: int = 0
    ) -> Choices:
        lines = [f"{label}. {text}" for label, text in zip(labels, texts, strict=True)]
        return cls(tuple(columns), tuple(labels), tuple(texts), tuple(lines), first, classes)

    def added_to(self, question: str) -> str:
        """The question with the options below it, unless it lists them already."""
        listed_already = all(line in question for line in self.lines) or (
            self.texts
            and all(
                re.search(rf"(?<!\w){re.escape(label)}\s*[).:]\s*{re.escape(text)}", question)
                for label, text in zip(self.labels, self.texts, strict=True)
            )
        )
        return question if listed_already else "\n".join([question, *self.lines])

    def named(self, value: Any, column: str, where: str) -> str | Numbered | None:
        """The answer that a value of an answer column stands for among these options.

        Returns the label that it names, the number of an option, the value as text where it is an answer written out,
        or None where the column hides the answer (-1), or is about something else.
        Raises UnusableRow for a letter that no option has.
        """
        is_index = column in INDEX_COLUMNS
        if isinstance(value, list):
            labels = [self.named(item, column, where) for item in value]
            if labels and all(isinstance(label, str) and label in self.labels for label in labels):
                return ", ".join(str(label) for label in labels)
            if len(labels) > 1 and any(isinstance(label, Numbered) for label in labels):
                raise UnusableRow(where, f"several numbers of options in {column!r}", "write letters")
            value = next((item for item in value if not is_missing(item)), None)
        if isinstance(value, bool) or is_missing(value) or not isinstance(value, (str, int, float)):
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value) if is_index or 0 <= value <= len(self.labels) else value
        text = encodable(value, where, column).strip()
        if not self.labels:
            return text
        if text not in self.texts:
            if text in (named := [*self.lines, *self.columns]) and len(named) == 2 * len(self.labels):
                return (2 * self.labels)[named.index(text)]
            text = re.sub(r"^(\d+)\.0$", r"\1", text)  # a number in a CSV that pandas wrote
        # A letter is a label even where another option's text is that letter (MMLU-Pro has such a row).
        by_label = {label.upper(): label for label in self.labels}
        if isinstance(value, str) and text.upper() in by_label and (text in self.labels or text not in self.texts):
            return by_label[text.upper()]
        match = _NAMED_OPTION.fullmatch(text)
        if match and match[1].upper() in by_label and isinstance(value, str) and text not in self.texts:
            return by_label[match[1].upper()]
        if match and match[1].lstrip("-").isdigit():
            number = int(match[1])
            if number < 0:
                return text if text in self.texts else None
            return Numbered(number, text, isinstance(value, str), column, self, where)
        if text in self.texts:
            return text
        if match and isinstance(value, str):
            options = listed(self.labels)
            raise UnusableRow(where, f"the answer {text!r} in {column!r}, but the options {options}", "correct it")
        return None if is_index else text


@dataclass(frozen=True)
class Numbered:
    """An answer that may be the number of an option: only the other rows tell from where the data set counts."""

    value: int
    text: str
    is_text: bool
    column: str
    choices: Choices
    where: str

    @property
    def usual_first(self) -> int:
        return self.choices.classes if self.column in CLASS_COLUMNS else self.choices.first

    @property
    def is_option(self) -> bool:
        """True if it is the text of an option too."""
        return self.text in self.choices.texts


def answers_of(numbers: Sequence[Numbered]) -> tuple[list[str | UnusableRow], list[str]]:
    """The label, or the text, that each number of a set's answers means, and what to know of how they were read.

    A 0 shows that options are counted from 0, and the number of all options that they are counted from 1; without
    either, the layout's own definition holds. Numbers are texts of options where one of them can be nothing else.

    Raises InputError where some rows count from 0 and others from 1.
    """
    answers: list[str | UnusableRow] = [""] * len(numbers)
    notes = []
    for column in dict.fromkeys(number.column for number in numbers):
        at = [i for i, number in enumerate(numbers) if number.column == column]
        of_column = [numbers[i] for i in at]
        first = _first_option(of_column)
        if first is None:
            for i in at:
                answers[i] = numbers[i].text if numbers[i].is_option else _no_option(numbers[i])
            continue
        # Numbers beside a list count from 0 (MMLU); of others there are versions that do not.
        is_known = all(not number.is_text and len(number.choices.columns) == 1 for number in of_column)
        if not is_known and not any(number.value in (0, len(number.choices.labels)) for number in of_column):
            notes.append(
                f"the answers in '{column}' are taken to count the options from {first}, though no row shows it: write "
                "letters if they do not"
            )
        for i in at:
            place = numbers[i].value - first
            labels = numbers[i].choices.labels
            answers[i] = labels[place] if 0 <= place < len(labels) else _no_option(numbers[i])
    return answers, notes


def _first_option(numbers: Sequence[Numbered]) -> int | None:
    """Number of the first option; None where the numbers are texts of options."""
    beyond = [number for number in numbers if not 0 <= number.value <= len(number.choices.labels)]
    if any(number.is_option for number in beyond) or all(number.is_option and number.is_text for number in numbers):
        return None
    only_numbers = [number for number in numbers if not number.is_option]
    from_0 = next((number for number in only_numbers if number.value == 0), None)
    from_1 = next((number for number in only_numbers if number.value == len(number.choices.labels)), None)
    if from_0 is not None and from_1 is not None:
        raise InputError(
            f"{from_0.where} has the answer 0 in {from_0.column!r}, and {from_1.where} the answer {from_1.value} of as "
            "many options: write letters, or count all from 0"
        )
    if from_0 is not None or from_1 is not None:
        return 0 if from_0 is not None else 1
    return numbers[0].usual_first


def _no_option(number: Numbered) -> UnusableRow:
    n = len(number.choices.labels)
    return UnusableRow(number.where, f"the answer {number.text} in {number.column!r}, but {n} options", "correct it")


def _text(value: Any, where: str, name: str) -> str:
    return encodable(value, where, name).strip()


def _is_list_of_options(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(isinstance(item, (str, int, float)) for item in value)
