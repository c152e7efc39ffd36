"""Makes examples of rows: training sets, and the domains whose change is forecast."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from string import ascii_uppercase
from typing import Any, TypeGuard

from sts_fast.data.folders import Origin, Use
from sts_fast.data.sources import Place, Places, domains_of, origin_of
from sts_fast.data.tables import Row, Table
from sts_fast.errors import InputError, listed

Turn = tuple[str, str]

# Column names in lower case; the first that a file has is taken.
TURN_COLUMNS = ("messages", "conversations", "conversation")
QUESTION_COLUMNS = ("question", "problem", "query", "instruction", "prompt", "input", "inputs")
# A reply that was written for training comes before a worked solution, and that before a bare result.
ANSWER_COLUMNS = (
    *("chosen", "completion", "response", "output"),
    *("cot_content", "generated_solution", "solution", "rationale", "canonical_solution", "long_answer", "code"),
    *("answer", "expected_answer", "target", "targets", "answerkey"),
)
INPUT_COLUMNS = ("input", "context")  # beside `instruction` only: Alpaca, Dolly
OPTION_COLUMNS = ("options", "choices")
SYSTEM_COLUMNS = ("system", "system_prompt")
ID_COLUMNS = ("id", "question_id", "unique_id", "task_id", "problem_id", "example_id", "prompt_id", "uuid", "idx")
CATEGORY_COLUMNS = ("category", "subject", "domain", "topic")

ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "observation", "function", "tool_response", "ipython"), "tool"),
}

# What columns are read for, in the order in which they are reported.
ROLES_OF_COLUMNS = ("category", "id", "context", "question", "options", "answer", "label")

ABSENT = object()
_CHATML_TURN = re.compile(r"<\|im_start\|>(\w+)\r?\n(.*?)(<\|im_end\|>|\Z)", re.DOTALL)
_EMPTY_THOUGHT = re.compile(r"<think>\s*</think>\s*")


@dataclass(frozen=True)
class Example:
    """One question, with the answer where the row has one.

    id:       the row's own id, else its key in a JSON object, else its row number, counted from 1
    question: the last user turn, stripped; never empty
    answer:   the reply that follows it, indentation kept; None where the row has none
    context:  earlier turns as (role, text), role one of system, user, assistant, tool; usually empty
    """

    id: str
    question: str
    answer: str | None
    context: tuple[Turn, ...] = ()


@dataclass(frozen=True)
class ReadColumns:
    """Columns of the tables of one set, as named there.

    origin:  the tables
    by_role: those that examples were made of, by 'question', 'options', 'context', 'answer', 'label', 'id', 'category'
    unread:  others that hold text
    """

    origin: Origin = field(default_factory=Origin)
    by_role: dict[str, list[str]] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        read = [f"{role} from {listed(names)}" for role, names in self.by_role.items()]
        return ", ".join(read) + (f"; not read: {listed(self.unread)}" if self.unread else "")


def are_examples(source: object) -> TypeGuard[Sequence[Example]]:
    """True for a list of examples, an empty one too."""
    return isinstance(source, (list, tuple)) and all(isinstance(example, Example) for example in source)


def load_examples(
    source: Places, *, question_field: str | None = None, answer_field: str | None = None
) -> list[Example]:
    """The examples of a training set, in order: of a file, a folder, a data set of the hub, rows in memory, or several.

    source: a path; owner/name[:config[:split]] on the hub; a list of dicts, a data set of `datasets`, a data frame; or
            a list of any of these, whose rows are one set

    What holds the question is decided by the column names of the first row, in any case: conversations
    (`messages`, `conversations`: role/content or from/value), prompt and completion or chosen reply, instruction and
    input, question, problem and the like. Each row's answer is its first non-empty column of `ANSWER_COLUMNS`;
    a reply that the row marks as undesirable (KTO's `label: false`) is none. Options of a multiple-choice question
    are appended to it as lines `A. ...`.

    question_field, answer_field: the columns to take instead; `a.b` is field b of column a.

    Raises InputError, naming the file and the row, for whatever cannot be read as such.
    """
    return read_examples(origin_of(source, "train", "train"), question_field, answer_field)[0]


def read_examples(
    origin: Origin, question_field: str | None = None, answer_field: str | None = None
) -> tuple[list[Example], ReadColumns]:
    """The examples of one set, with the columns that they were made of."""
    rows, columns = _read(origin, question_field, answer_field, by_category=False)
    return [example for _, example in rows], columns


def load_domains(
    sources: Sequence[Place],
    *,
    question_fields: Mapping[str, str] | None = None,
    answer_fields: Mapping[str, str] | None = None,
    other_names: Iterable[str] = (),
) -> dict[str, list[Example]]:
    """Domain name -> its examples, in the order given.

    Each source is one of
    - `name=path`: all of that file or folder is the domain `name` (a path that exists as it stands comes first), and
      all paths given under that name are;
    - a folder of files, or of folders: each is a domain, by name, whatever its columns; of its splits `test` is read,
      else validation, dev, train; hidden and other files are ignored;
    - one file, one data set in splits or shards, owner/name[:config[:split]] on the hub, or rows in memory: a column
      `category`, `subject`, `domain` or `topic` splits it into domains in order of first appearance; without one it is
      a single domain named after the file.

    question_fields, answer_fields: file, folder or `name=` name -> column as in `load_examples`; "" stands for all.
    other_names: names that the fields may hold besides those of the sources: of sets that are read elsewhere

    Raises InputError for unreadable sources, a domain named twice, a row without category, a name in the fields
    that no source has.
    """
    domains = read_domains(sources, question_fields or {}, answer_fields or {}, other_names)
    return {name: examples for name, (examples, _) in domains.items()}


def read_domains(
    sources: Sequence[Place],
    question_fields: Mapping[str, str],
    answer_fields: Mapping[str, str],
    other_names: Iterable[str] = (),
    use: Use = "domain",
) -> dict[str, tuple[list[Example], ReadColumns]]:
    """The same, with the columns that each was made of."""
    domains: dict[str, tuple[list[Example], ReadColumns]] = {}
    names = [""]
    for name, origin, by_category in domains_of(sources, use):
        names.append(name)
        question_field = question_fields.get(name, question_fields.get(""))
        answer_field = answer_fields.get(name, answer_fields.get(""))
        examples_of: dict[str, list[Example]] = {}
        rows, columns = _read(origin, question_field, answer_field, by_category=by_category)
        for category, example in rows:
            examples_of.setdefault(name if category is None else category, []).append(example)
        for domain, examples in examples_of.items():
            if domain in domains:
                raise InputError(f"domain {domain!r} of {origin} exists already; name it with NAME=PATH")
            domains[domain] = examples, columns
    allowed = {*names, *other_names}
    for name in (*question_fields, *answer_fields):
        if name not in allowed:
            raise InputError(f"a field is named for {name!r}, but the sources are {listed(names[1:])}")
    return domains


def _read(
    origin: Origin, question_field: str | None, answer_field: str | None, *, by_category: bool
) -> tuple[list[tuple[str | None, Example]], ReadColumns]:
    """(category, example) of every row; its category is None where no column holds one or none is asked for."""
    rows, columns, n_before = [], ReadColumns(origin), 0
    for table in origin.tables:
        reader = _RowReader(table, question_field, answer_field, by_category=by_category)
        number = 0
        for number, key, row in table.read():
            if not isinstance(row, dict):
                raise InputError(
                    f"{table}: row {number} is {kind_of(row)}; every row must be an object with named fields"
                )
            rows.append(reader.read(row, f"{table}: row {number}", key or str(n_before + number)))
        reader.check_answer_field()
        reader.add_columns(columns)
        n_before += number
    if not n_before:
        raise InputError(f"{listed(origin.tables)} holds no examples; give a file with at least one row")
    return rows, columns


class _RowReader:
    """Makes examples of the rows of one table; the first row decides where question and category are."""

    def __init__(
        self, table: Table, question_field: str | None, answer_field: str | None, *, by_category: bool
    ) -> None:
        self.table = table
        self.question_field = question_field
        self.answer_field = answer_field
        self.by_category = by_category
        self.question_column = ""
        self.category_column: str | None = None
        self.columns: list[str] | None = None
        self.has_answer_field = False
        # By role, and of text, the columns met so far, in lower case; dicts, because these keep the order.
        self.used: dict[str, dict[str, None]] = {}
        self.of_text: dict[str, None] = {}

    def read(self, row: Row, where: str, default_id: str) -> tuple[str | None, Example]:
        """(category, example) of a row; `where` names it in errors."""
        fields: Row = {}
        for name, value in row.items():
            fields.setdefault(str(name).strip().lower(), value)
        if self.columns is None:
            self.columns = [*row]
            self._choose_columns(row, fields)
        self.of_text |= {name: None for name, value in fields.items() if _is_text(value) or is_turns(value)}
        return self._category(fields, where), self._example(row, fields, where, default_id)

    def add_columns(self, columns: ReadColumns) -> None:
        """Adds those of this table to those of a set, in the table's spelling."""
        spelt = {name.strip().lower(): name.strip() for name in self.columns or ()}
        for role in (role for role in ROLES_OF_COLUMNS if role in self.used):
            names = columns.by_role.setdefault(role, [])
            names += [name for used in self.used[role] if (name := spelt.get(used, used)) not in names]
        # A field of a column, as `a.b`, reads that column.
        read = {part.lower() for names in self.used.values() for name in names for part in (name, name.split(".")[0])}
        unread = [spelt.get(name, name) for name in self.of_text if name not in read]
        columns.unread.extend(name for name in unread if name not in columns.unread)

    def _use(self, role: str, *names: str) -> None:
        self.used.setdefault(role, {}).update(dict.fromkeys(names))

    def check_answer_field(self) -> None:
        if self.columns is not None and self.answer_field is not None and not self.has_answer_field:
            raise InputError(f"{self.table} has no field {self.answer_field!r}; its columns are {listed(self.columns)}")

    def _choose_columns(self, row: Row, fields: Row) -> None:
        if self.by_category:
            self.category_column = next((name for name in CATEGORY_COLUMNS if name in fields), None)
        if self.question_field is None:
            known = [name for name in TURN_COLUMNS if is_turns(fields.get(name))]
            known += [name for name in QUESTION_COLUMNS if name in fields]
            known += ["chosen"] if is_turns(fields.get("chosen")) else []
            if not known:
                raise InputError(
                    f"{self.table} has no column known to hold questions among {listed(row)}; "
                    f"name one with --question-field, and its answers with --answer-field{self.table.header_remedy}"
                )
            self.question_column = known[0]

    def _category(self, fields: Row, where: str) -> str | None:
        if self.category_column is None:
            return None
        value = fields.get(self.category_column)
        if is_missing(value) or not isinstance(value, (str, int, float)):
            raise InputError(f"{where} has no {self.category_column}; fill it in, or give the file as NAME=PATH")
        self._use("category", self.category_column)
        return encodable(value, where, self.category_column).strip()

    def _example(self, row: Row, fields: Row, where: str, default_id: str) -> Example:
        turns, begun = self._turns(row, fields, where)
        reply = self._reply(row, fields, where)
        if any(role == "user" for role, _ in reply):
            turns = reply  # preference data whose chosen side is the whole conversation
        elif turns and turns[-1][0] != "assistant":
            turns = turns + reply
        context, question, answer = _split_turns(turns, where)
        if not question.strip():
            raise InputError(f"{where} has an empty question; fill it in or remove the row")
        if fields.get("label") is False:
            self._use("label", "label")
        if fields.get("label") is False or answer is None or not answer.strip():
            answer = None
        own_id = next((name for name in ID_COLUMNS if _is_id(fields.get(name))), None)
        if own_id is not None:
            self._use("id", own_id)
        earlier = self._earlier_turns(fields, where, context)
        return Example(
            id=encodable(default_id if own_id is None else fields[own_id], where, own_id or "id").strip(),
            question=question.strip(),
            answer=None if answer is None else _without_margin(begun + answer),
            context=tuple(earlier + context),
        )

    def _turns(self, row: Row, fields: Row, where: str) -> tuple[list[Turn], str]:
        """The conversation that the question column holds, and how it makes the reply begin, which is rare."""
        name = self.question_field or self.question_column
        value = fields.get(name) if self.question_field is None else lookup(row, name)
        if value is ABSENT:
            raise InputError(f"{where} has no field {name!r}; its columns are {listed(row)}")
        if is_missing(value):
            raise InputError(f"{where} has no question in {name!r}; fill it in or remove the row")
        self._use("question", name)
        if is_turns(value):
            return parsed_turns(value, where), ""
        if not isinstance(value, str):
            raise InputError(f"{where} holds {kind_of(value)} in {name!r}; name a column of text with --question-field")
        question = encodable(value, where, name).strip()
        if question.startswith("<|im_start|>"):
            return chatml_turns(question, where)
        if name.lower() == "instruction":
            added = [column for column in INPUT_COLUMNS if _is_text(fields.get(column))]
            self._use("question", *added)
            question = "\n\n".join([question, *(encodable(fields[name], where, "input").strip() for name in added)])
        lines = _option_lines(fields, where)
        if lines:
            self._use("options", next(name for name in OPTION_COLUMNS if not is_missing(fields.get(name))))
        if not all(line in question for line in lines):
            question = "\n".join([question, *lines])
        return [("user", question)], ""

    def _reply(self, row: Row, fields: Row, where: str) -> list[Turn]:
        """The answer column's turns: usually one of the assistant, none where the row has no answer."""
        if self.answer_field is not None:
            name, value = self.answer_field, lookup(row, self.answer_field)
            self.has_answer_field |= value is not ABSENT
        else:
            name = next((name for name in ANSWER_COLUMNS if not is_missing(fields.get(name))), "")
            value = fields.get(name)
        if not (value is ABSENT or is_missing(value)):
            self._use("answer", name)
        turns = [value] if isinstance(value, dict) else value
        if is_turns(turns):
            return parsed_turns(turns, where)
        if isinstance(value, list):
            value = next((item for item in value if not is_missing(item)), None)  # alternatives: the first
        if value is ABSENT or is_missing(value):
            return []
        if type(value) is int:
            is_index = 0 <= value < len(_option_lines(fields, where))
            value = ascii_uppercase[value] if is_index else value
        if not isinstance(value, (str, int, float)):
            raise InputError(f"{where} holds {kind_of(value)} in {name!r}; name a column of text with --answer-field")
        text = encodable(value, where, name)
        return [("assistant", text.removeprefix("A: ") if name == "cot_content" else text)]

    def _earlier_turns(self, fields: Row, where: str, context: list[Turn]) -> list[Turn]:
        """Turns that are in columns of their own: Alpaca's `system` and `history`."""
        turns: list[Turn] = []
        system = next((name for name in SYSTEM_COLUMNS if _is_text(fields.get(name))), None)
        if system is not None and not (context and context[0][0] == "system"):
            self._use("context", system)
            turns.append(("system", encodable(fields[system], where, "system")))
        for pair in fields.get("history") or ():
            if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
                raise InputError(f"{where} has a history that is no list of [question, answer] pairs; correct it")
            self._use("context", "history")
            question, answer = (encodable(text, where, "history") for text in pair)
            turns += [("user", question), ("assistant", answer)]
        return turns


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


def _is_id(value: Any) -> bool:
    return type(value) in (str, int) and bool(str(value).strip())


def parsed_turns(value: Any, where: str) -> list[Turn]:
    turns: list[Turn] = []
    for item in value:
        if not is_turns([item]):
            raise InputError(f"{where} has a turn that is {kind_of(item)}; write turns as role and content")
        name = item.get("role") if "role" in item else item["from"]
        role = ROLES.get(str(name).strip().lower())
        if role is None:
            raise InputError(f"{where} has a turn of the unknown role {name!r}; use system, user, assistant or tool")
        content = item["content"] if "content" in item else item.get("value")
        text = _turn_text(content, where)
        if not text.strip() and item.get("tool_calls"):
            text = encodable(json.dumps(item["tool_calls"], ensure_ascii=False, default=str), where, "tool_calls")
        if text.strip() or role in ("user", "tool"):
            turns.append((role, text))
    return turns


def _turn_text(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, list):  # parts, as of a multimodal chat
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise InputError(f"{where} has a turn with parts that are not text; keep only text")
        return "\n".join(encodable(part["text"], where, "content") for part in content)
    if not isinstance(content, str):
        raise InputError(f"{where} has a turn whose content is {kind_of(content)}; write it as text")
    return encodable(content, where, "content")


def chatml_turns(text: str, where: str) -> tuple[list[Turn], str]:
    """Turns of a prompt that was rendered already: the model's own template will render it again.

    The second value is what the open last turn makes the assistant begin with; a thought left empty does not count.
    """
    turns = [(match[1], match[2].strip(), bool(match[3])) for match in _CHATML_TURN.finditer(text)]
    prefill = ""
    if turns and turns[-1][0] == "assistant" and not turns[-1][2]:
        prefill = _EMPTY_THOUGHT.sub("", turns.pop()[1])
    return parsed_turns([{"role": role, "content": content} for role, content, _ in turns], where), prefill


def _split_turns(turns: list[Turn], where: str) -> tuple[list[Turn], str, str | None]:
    """(earlier turns, question, answer): the last user turn that has a reply, else the last user turn."""
    user_turns = [i for i, (role, _) in enumerate(turns) if role == "user"]
    if not user_turns:
        raise InputError(f"{where} has no turn of the user; every conversation needs one")
    replied = [i for i in user_turns if i + 1 < len(turns) and turns[i + 1][0] == "assistant"]
    at = replied[-1] if replied else user_turns[-1]
    return turns[:at], turns[at][1], turns[at + 1][1] if replied else None


def _option_lines(fields: Row, where: str) -> list[str]:
    """`A. ...` a line, of a list, of {label: text}, or of {"label": [...], "text": [...]}; empty without options."""
    options = next((fields[name] for name in OPTION_COLUMNS if not is_missing(fields.get(name))), None)
    if options is None:
        return []
    if isinstance(options, dict) and isinstance(options.get("text"), list) and isinstance(options.get("label"), list):
        options = dict(zip(options["label"], options["text"], strict=False))
    if isinstance(options, dict):
        return [f"{label}. {encodable(text, where, 'options').strip()}" for label, text in options.items()]
    if isinstance(options, str):
        return [options.strip()]
    if not isinstance(options, list) or len(options) > len(ascii_uppercase):
        raise InputError(f"{where} has options that are not a list of at most 26; correct it")
    texts = [encodable(text, where, "options").strip() for text in options]
    lettered = [*zip(ascii_uppercase, texts, strict=False)]
    if all(re.match(rf"\(?{letter}[).:]", text) for letter, text in lettered):
        return texts
    return [f"{letter}. {text}" for letter, text in lettered]


def encodable(value: object, where: str, name: str) -> str:
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where} has half a character (a lone surrogate) in {name!r}; remove it") from error
    return text


def _without_margin(text: str) -> str:
    """Without blank lines around it; code keeps the indentation of its first line."""
    text = re.sub(r"\A(?:[^\S\n]*\n)+", "", text).rstrip()
    return text[1:] if re.match(r" \S", text) else text


def is_missing(value: Any) -> bool:
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def is_turns(value: Any) -> bool:
    return (
        isinstance(value, list) and bool(value) and isinstance(value[0], dict) and bool({"role", "from"} & {*value[0]})
    )


def kind_of(value: Any) -> str:
    if value is None:
        return "empty"
    return {dict: "an object", list: "a list", str: "a text", bool: "a truth value"}.get(type(value), "a number")
