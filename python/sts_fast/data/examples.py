"""Makes examples of rows: training sets, and the domains whose change is forecast."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from sts_fast.data.choices import INDEX_COLUMNS, Choices, Numbered, answers_of
from sts_fast.data.columns import (
    ANSWER_COLUMNS,
    CATEGORY_COLUMNS,
    ID_COLUMNS,
    INPUT_COLUMNS,
    LABEL_COLUMNS,
    PASSAGE_COLUMNS,
    QUESTION_COLUMNS,
    ROLES_OF_COLUMNS,
    STEM_COLUMNS,
    STRUCTURED_COLUMNS,
    SYSTEM_COLUMNS,
    TOOL_COLUMNS,
    TURN_COLUMNS,
    ReadRows,
    canonical,
    is_readable,
    row_warnings,
)
from sts_fast.data.folders import Origin, Use
from sts_fast.data.rendered import undone
from sts_fast.data.sources import Place, Places, domains_of, origin_of
from sts_fast.data.tables import Row, Table
from sts_fast.data.turns import ToolCall, Turn, check_no_media, is_turns, parsed_turns, split_turns, tools_turn
from sts_fast.data.values import (
    ABSENT,
    answer_value,
    each_answer,
    encodable,
    is_good,
    is_missing,
    is_structure,
    is_text,
    kind_of,
    lookup,
    parsed,
    passage_text,
    without_margin,
    words_of,
)
from sts_fast.errors import InputError, UnusableRow, listed


@dataclass(frozen=True)
class Example:
    """One question, with the answer where the row has one.

    id:       the row's own id, else its key in a JSON object, else its row number, counted from 1
    question: the last user turn, stripped; never empty
    answer:   the reply, indentation kept; its tool calls as JSON where it has no text; None where the row has none
    context:  earlier turns, usually empty; (role, content) is taken for a turn
    steps:    turns between question and reply: tool calls and their results, usually none
    reasoning, tool_calls: what the assistant thinks before the answer's text, and calls behind it
    """

    id: str
    question: str
    answer: str | None
    context: tuple[Turn, ...] = ()
    steps: tuple[Turn, ...] = ()
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()

    def __post_init__(self) -> None:
        turns = (turn if isinstance(turn, Turn) else Turn(*turn) for turn in self.context)
        object.__setattr__(self, "context", tuple(turns))

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The conversation up to the reply."""
        return *self.context, Turn("user", self.question), *self.steps

    @property
    def reply(self) -> Turn | None:
        """The reply as a turn; None where there is none."""
        if self.answer is None:
            return None
        alone = Turn("assistant", "", self.reasoning, self.tool_calls)
        return alone if self.tool_calls and alone.text == self.answer else replace(alone, content=self.answer)


def are_examples(source: object) -> TypeGuard[Sequence[Example]]:
    """True for a list of examples, an empty one too."""
    return isinstance(source, (list, tuple)) and all(isinstance(example, Example) for example in source)


def load_examples(
    source: Places, *, question_field: str | None = None, answer_field: str | None = None, strict: bool = False
) -> list[Example]:
    """The examples of a training set, in order: of a file, a folder, a data set of the hub, rows in memory, or several.

    source: a path; owner/name[:config[:split]] on the hub; a list of dicts, a data set of `datasets`, a data frame; or
            a list of any of these, whose rows are one set

    What holds the question is decided by the column names of the first row, in any case: conversations
    (`messages`, `conversations`: role/content or from/value), prompt and completion or chosen reply, instruction and
    input, question, problem and the like. A passage, context, article or story comes before it, a blank line between.
    Options of a multiple-choice question are appended to it as lines `A. ...`.

    Each row's answer is its first non-empty column of `ANSWER_COLUMNS`; of a question with options, one of
    `INDEX_COLUMNS` too, and the number of an option becomes its letter. A truth value is yes or no, of several right
    answers the first is taken, and a reply that the row labels as bad (KTO's `label: false`) is none.

    question_field, answer_field: the columns to take instead; `a.b` is field b of column a.
    strict: stop at the first row without an example, instead of leaving it out with a warning

    Raises InputError, naming the file and the row, for whatever cannot be read as such, and where no row can.
    """
    origin = origin_of(source, "train", "train")
    examples, read = read_examples(origin, question_field, answer_field, strict=strict)
    _warn([(listed(origin.tables), read)])
    return examples


def read_examples(
    origin: Origin, question_field: str | None = None, answer_field: str | None = None, *, strict: bool = False
) -> tuple[list[Example], ReadRows]:
    """The examples of one set, with what became of the rows, and without the warnings."""
    rows, read = _read(origin, question_field, answer_field, by_category=False, strict=strict)
    return [example for _, example in rows], read


def load_domains(
    sources: Sequence[Place],
    *,
    question_fields: Mapping[str, str] | None = None,
    answer_fields: Mapping[str, str] | None = None,
    other_names: Iterable[str] = (),
    strict: bool = False,
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
    strict: as in `load_examples`; a row without category is one without an example

    Raises InputError for unreadable sources, a domain named twice, a name in the fields that no source has.
    """
    domains = read_domains(sources, question_fields or {}, answer_fields or {}, other_names, strict=strict)
    _warn([(name, read) for name, (_, read) in domains.items()])
    return {name: examples for name, (examples, _) in domains.items()}


def _warn(read: Sequence[tuple[str, ReadRows]]) -> None:
    for warning in row_warnings(read, unremarkable=0):
        warnings.warn(warning, stacklevel=3)


def read_domains(
    sources: Sequence[Place],
    question_fields: Mapping[str, str],
    answer_fields: Mapping[str, str],
    other_names: Iterable[str] = (),
    use: Use = "domain",
    *,
    strict: bool = False,
) -> dict[str, tuple[list[Example], ReadRows]]:
    """The same, with what became of the rows, and without the warnings; domains of one file share this."""
    domains: dict[str, tuple[list[Example], ReadRows]] = {}
    names = [""]
    for name, origin, by_category in domains_of(sources, use):
        names.append(name)
        question_field = question_fields.get(name, question_fields.get(""))
        answer_field = answer_fields.get(name, answer_fields.get(""))
        examples_of: dict[str, list[Example]] = {}
        rows, read = _read(origin, question_field, answer_field, by_category=by_category, strict=strict)
        for category, example in rows:
            examples_of.setdefault(name if category is None else category, []).append(example)
        for domain, examples in examples_of.items():
            if domain in domains:
                raise InputError(f"domain {domain!r} of {origin} exists already; name it with NAME=PATH")
            domains[domain] = examples, read
    allowed = {*names, *other_names}
    for name in (*question_fields, *answer_fields):
        if name not in allowed:
            raise InputError(f"a field is named for {name!r}, but the sources are {listed(names[1:])}")
    return domains


def _read(
    origin: Origin, question_field: str | None, answer_field: str | None, *, by_category: bool, strict: bool
) -> tuple[list[tuple[str | None, Example]], ReadRows]:
    """(category, example) of every usable row; its category is None where no column holds one or none is asked for."""
    rows: list[tuple[str | None, Example]] = []
    read, n_before = ReadRows(origin), 0
    numbers: dict[int, Numbered] = {}  # by place in `rows`
    unusable: list[UnusableRow] = []
    for table in origin.tables:
        reader = _RowReader(table, question_field, answer_field, by_category=by_category)
        number = 0
        for number, key, row in table.read():
            read.n_rows += 1
            where, default_id = f"{table}: row {number}", key or str(n_before + number)
            try:
                category, example, answer_number = reader.read(row, where, default_id)
            except UnusableRow as error:
                unusable.append(error)
                continue
            if answer_number is not None:
                numbers[len(rows)] = answer_number
            rows.append((category, example))
        reader.check_answer_field()
        reader.add_to(read)
        n_before += number
    answers, read.notes = answers_of([*numbers.values()])
    for at, answer in zip(numbers, answers, strict=True):
        if isinstance(answer, UnusableRow):
            unusable.append(answer)
        else:
            rows[at] = rows[at][0], replace(rows[at][1], answer=answer)
    dropped = {at for at, answer in zip(numbers, answers, strict=True) if isinstance(answer, UnusableRow)}
    if strict and unusable:
        raise unusable[0]
    read.left_out.update(error.reason for error in unusable)
    if not read.n_rows:
        raise InputError(f"{listed(origin.tables)} holds no examples; give a file with at least one row")
    if read.n_left_out == read.n_rows:
        raise InputError(f"{listed(origin.tables)} has no usable row among {read.n_rows}: {unusable[0]}")
    return [row for at, row in enumerate(rows) if at not in dropped], read


class _RowReader:
    """Makes examples of the rows of one table; the first with a question decides where question and category are."""

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
        self.n_bad = 0
        # By role, and not read unless they have one, the columns met so far; dicts, because these keep the order.
        self.used: dict[str, dict[str, None]] = {}
        self.readable: dict[str, None] = {}

    def read(self, row: Any, where: str, default_id: str) -> tuple[str | None, Example, Numbered | None]:
        """(category, example, the number of an option that is its answer) of a row; `where` names it in errors.

        Raises UnusableRow where it has no example.
        """
        if not isinstance(row, dict):
            kind = "nothing" if row is None else kind_of(row)
            raise UnusableRow(where, f"{kind} instead of named fields", "write every row as an object")
        fields: Row = {}
        for name, value in row.items():
            fields.setdefault(canonical(name), value)
        if self.columns is None:
            if all(map(is_missing, fields.values())):
                raise UnusableRow(where, "no values", "fill it in or remove the row")
            self._choose_columns(row, fields, where)
            self.columns = [*row]
        self.readable |= {name: None for name, value in fields.items() if is_readable(name, value)}
        example, number = self._example(row, fields, where, default_id)
        return self._category(fields, where), example, number

    def add_to(self, read: ReadRows) -> None:
        """Adds the columns of this table, in its own spelling, and its bad replies to those of a set."""
        spelt: dict[str, str] = {}
        for name in self.columns or ():
            spelt.setdefault(canonical(name), name.strip())
        for role in (role for role in ROLES_OF_COLUMNS if role in self.used):
            names = read.columns.by_role.setdefault(role, [])
            names += [name for used in self.used[role] if (name := spelt.get(used, used)) not in names]
        # A field of a column, as `a.b`, reads that column.
        used = {canonical(part) for names in self.used.values() for n in names for part in (n, n.split(".")[0])}
        unread = [spelt.get(name, name) for name in self.readable if name not in used]
        read.columns.unread.extend(name for name in unread if name not in read.columns.unread)
        read.n_bad += self.n_bad

    def _use(self, role: str, *names: str) -> None:
        self.used.setdefault(role, {}).update(dict.fromkeys(names))

    def check_answer_field(self) -> None:
        if self.columns is not None and self.answer_field is not None and not self.has_answer_field:
            raise InputError(f"{self.table} has no field {self.answer_field!r}; its columns are {listed(self.columns)}")

    def _choose_columns(self, row: Row, fields: Row, where: str) -> None:
        if self.by_category:
            self.category_column = next((name for name in CATEGORY_COLUMNS if name in fields), None)
        if self.question_field is None:
            if empty := next((name for name in TURN_COLUMNS if name in fields and is_missing(fields[name])), None):
                raise UnusableRow(where, f"no turns in {empty!r}", "fill it in or remove the row")
            known = [name for name in TURN_COLUMNS if is_turns(fields.get(name))]
            known += [name for name in QUESTION_COLUMNS if name in fields]
            known += ["chosen"] if is_turns(fields.get("chosen")) or _is_rendered(fields.get("chosen")) else []
            known += ["text"] if _is_rendered(fields.get("text")) else []
            if not known and Choices.of(fields, where) is not None:
                known = [name for name in STEM_COLUMNS if name in fields]
            if not known and (lost := [name for name in TURN_COLUMNS if not is_missing(fields.get(name))]):
                raise InputError(
                    f"{self.table}: {lost[0]!r} holds {kind_of(fields[lost[0]])} that is no conversation; write it as "
                    'JSON, [{"role": "user", "content": "..."}, ...], or name another column with --question-field'
                )
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
            raise UnusableRow(where, f"no {self.category_column}", "fill it in, or give the file as NAME=PATH")
        self._use("category", self.category_column)
        return encodable(value, where, self.category_column).strip()

    def _example(self, row: Row, fields: Row, where: str, default_id: str) -> tuple[Example, Numbered | None]:
        choices, number = Choices.of(fields, where), None
        reply = self._reply(row, fields, where, choices)
        if isinstance(reply, Numbered):
            number, reply = reply, [Turn("assistant", reply.text)]
        turns, begun = self._turns(row, fields, where, choices, reply[-1].content if reply else "")
        if any(turn.role == "user" for turn in reply):
            turns = reply  # preference data whose chosen side is the whole conversation
        elif begun and (reply or begun.strip() != "<think>"):
            # The question column holds the start of the reply, or all of it where there is no answer column.
            is_whole = not reply or reply[0].content.strip() in begun
            turns = [*turns, Turn("assistant", begun if is_whole else begun + reply[0].content), *reply[1:]]
        elif turns and turns[-1].role != "assistant":
            turns = turns + reply
        check_no_media(fields, turns, where)
        if not any(turn.role == "user" for turn in turns):
            raise UnusableRow(where, "no turn of the user", "every conversation needs one")
        context, question, steps, last = split_turns(turns, where)
        answer = None if last is None else last.text if not last.content.strip() else last.content
        if not question.strip():
            raise UnusableRow(where, "an empty question", "fill it in or remove the row")
        if answer is None or not answer.strip() or not self._is_good(fields, where, choices):
            answer = last = number = None
        own_id = next((name for name in ID_COLUMNS if _is_id(fields.get(name))), None)
        if own_id is not None:
            self._use("id", own_id)
        earlier = self._earlier_turns(fields, where, context)
        example = Example(
            id=encodable(default_id if own_id is None else fields[own_id], where, own_id or "id").strip(),
            question=question.strip(),
            answer=None if answer is None else without_margin(answer),
            context=tuple(earlier + context),
            steps=tuple(steps),
            reasoning="" if last is None else last.reasoning.strip(),
            tool_calls=() if last is None else last.tool_calls,
        )
        return example, number

    def _is_good(self, fields: Row, where: str, choices: Choices | None) -> bool:
        """False where the row labels its reply as bad; a label beside options is the number of one."""
        is_read = {*self.used.get("answer", ()), *(INDEX_COLUMNS if choices is not None else ())}
        label = next((name for name in LABEL_COLUMNS if name in fields and name not in is_read), None)
        if label is None:
            return True
        self._use("label", label)
        good = is_good(fields[label], where, label)
        self.n_bad += not good
        return good

    def _turns(self, row: Row, fields: Row, where: str, choices: Choices | None, reply: str) -> tuple[list[Turn], str]:
        """The conversation that the question column holds, and how it makes the reply begin, which is rare."""
        name = self.question_field or self.question_column
        value = fields.get(name) if self.question_field is None else lookup(row, name)
        if value is ABSENT:
            raise UnusableRow(where, f"no field {name!r}", f"its columns are {listed(row)}")
        if is_missing(value):
            raise UnusableRow(where, f"no question in {name!r}", "fill it in or remove the row")
        self._use("question", name)
        if is_turns(value):
            return parsed_turns(value, where), ""
        if canonical(name) == "questions" and isinstance(value, list):
            return self._series(value, fields, where), ""
        if not isinstance(value, str):
            raise UnusableRow(where, f"{kind_of(value)} in {name!r}", "name a column of text with --question-field")
        question = encodable(value, where, name).strip()
        if (rendered := undone(question, where, reply)) is not None:
            return rendered
        question = self._about(question, canonical(name), fields, where)
        if choices is not None:
            self._use("options", *choices.columns)
            question = choices.added_to(question)
        return [Turn("user", question)], ""

    def _about(self, question: str, name: str, fields: Row, where: str) -> str:
        """The question with its passages, unless it quotes them itself."""
        added: list[str] = []
        for column in INPUT_COLUMNS if name == "instruction" else PASSAGE_COLUMNS:
            value = fields.get(column)
            text = None if column == name or is_turns(value) else passage_text(parsed(value)) or passage_text(value)
            if text is None:
                continue
            self._use("question" if column == "input" else "passage", column)
            text = encodable(text, where, column)
            if not any(words_of(text) in words_of(other) for other in (question, *added)):
                added.append(text)
        return "\n\n".join([question, *added] if name == "instruction" else [*added, question])

    def _series(self, questions: list[Any], fields: Row, where: str) -> list[Turn]:
        """The conversation of a passage's questions, as of CoQA: each after the answers to those before it."""
        answers = each_answer(fields.get("answers"))
        if len(questions) != len(answers):
            reason = f"{len(questions)} entries in 'questions', but {len(answers)} in 'answers'"
            raise UnusableRow(where, reason, "give an answer to each question")
        self._use("answer", "answers")
        turns: list[Turn] = []
        for question, answer in zip(questions, answers, strict=True):
            if not is_text(question) or is_missing(answer):
                raise UnusableRow(where, "an empty entry in 'questions' or 'answers'", "fill it in")
            turns.append(Turn("user", encodable(question, where, "questions").strip()))
            turns.append(Turn("assistant", encodable(answer, where, "answers").strip()))
        return [Turn("user", self._about(turns[0].content, "questions", fields, where)), *turns[1:]]

    def _reply(self, row: Row, fields: Row, where: str, choices: Choices | None) -> list[Turn] | Numbered:
        """The answer column's turns: usually one of the assistant, none where the row has no answer.

        Returns the number of an option as such: see answers_of.
        """
        if self.answer_field is not None:
            named = lookup(row, self.answer_field)
            self.has_answer_field |= named is not ABSENT
            columns = {} if named is ABSENT else {self.answer_field: named}
        else:
            names = (*ANSWER_COLUMNS, *(INDEX_COLUMNS if choices is not None else ()))
            options = () if choices is None else choices.columns
            columns = {name: fields[name] for name in names if name in fields and name not in options}
        for name, given in columns.items():
            value = parsed(given) if name in STRUCTURED_COLUMNS else given
            turns = [value] if isinstance(value, dict) and not is_turns(value) else value
            if is_turns(turns):
                self._use("answer", name)
                return parsed_turns(turns, where)
            if name == "chosen" and isinstance(value, str) and (rendered := undone(value, where)) is not None:
                self._use("answer", name)
                replies, begun = rendered
                return [*replies, Turn("assistant", begun)] if begun else replies
            answer = value if choices is not None and isinstance(value, list) else answer_value(value)
            if choices is not None and not isinstance(answer, dict):
                answer = choices.named(answer, canonical(name), where)
            if is_missing(answer):
                continue
            self._use("answer", name)
            if isinstance(answer, Numbered):
                return answer
            if not isinstance(answer, (str, int, float)) or (name in STRUCTURED_COLUMNS and is_structure(answer)):
                reason = f"{kind_of(answer)} in {name!r}"
                raise UnusableRow(where, reason, "name a column of text with --answer-field")
            text = encodable(answer, where, name)
            return [Turn("assistant", text.removeprefix("A: ") if name == "cot_content" else text)]
        return []

    def _earlier_turns(self, fields: Row, where: str, context: list[Turn]) -> list[Turn]:
        """Turns that are in columns of their own: `tools`, and Alpaca's `system` and `history`."""
        turns: list[Turn] = []
        for name in TOOL_COLUMNS:
            if not turns and (tools := tools_turn(fields.get(name), where)) is not None:
                self._use("context", name)
                turns.append(tools)
        system = next((name for name in SYSTEM_COLUMNS if is_text(fields.get(name))), None)
        if system is not None and not (context and context[0].role == "system"):
            self._use("context", system)
            turns.append(Turn("system", encodable(fields[system], where, "system")))
        for pair in fields.get("history") or ():
            if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
                raise UnusableRow(where, "a history that is no list of [question, answer] pairs", "correct it")
            self._use("context", "history")
            question, answer = (encodable(text, where, "history") for text in pair)
            turns += [Turn("user", question), Turn("assistant", answer)]
        return turns


def _is_id(value: Any) -> bool:
    return type(value) in (str, int) and bool(str(value).strip())


def _is_rendered(value: Any) -> bool:
    return isinstance(value, str) and undone(value, "") is not None
