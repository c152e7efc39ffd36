"""Finds in the rows of a table what is asked and what is replied, by the names of their columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sts_fast.data.choices import INDEX_COLUMNS, Choices, Numbered
from sts_fast.data.columns import (
    ANSWER_COLUMNS,
    CATEGORY_COLUMNS,
    ID_COLUMNS,
    INPUT_COLUMNS,
    LABEL_COLUMNS,
    PASSAGE_COLUMNS,
    QUESTION_COLUMNS,
    REASONING_COLUMNS,
    ROLES_OF_COLUMNS,
    STEM_COLUMNS,
    STRUCTURED_COLUMNS,
    SYSTEM_COLUMNS,
    TOOL_COLUMNS,
    TURN_COLUMNS,
    ReadRows,
    canonical,
    is_readable,
)
from sts_fast.data.rendered import undone, without_end
from sts_fast.data.tables import Row, Table
from sts_fast.data.turns import (
    Turn,
    calls_turn,
    check_no_media,
    history_turns,
    is_turns,
    parsed_turns,
    split_turns,
    tools_turn,
)
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
    words_of,
)
from sts_fast.errors import InputError, UnusableRow, listed


@dataclass(frozen=True)
class Exchange:
    """A question and its reply, as a row has them.

    id:       the row's own; None where it has none
    category: None where no column holds one, or none is asked for
    reply:    the assistant's; None where the row has none that is good
    number:   that of the option which is the reply, where a number names it
    """

    id: str | None
    category: str | None
    context: list[Turn]
    question: str
    steps: list[Turn]
    reply: Turn | None
    number: Numbered | None


class RowReader:
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

    def read(self, row: Any, where: str) -> Exchange:
        """Reads the example of a row; `where` names the row in errors. Raises UnusableRow where there is none."""
        if isinstance(row, UnusableRow):
            raise row
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
        return self._exchange(row, fields, where)

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
        unread = [spelt.get(name, name) for name in self.readable if name and name not in used]
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

    def _exchange(self, row: Row, fields: Row, where: str) -> Exchange:
        choices, number, begun = Choices.of(fields, where), None, ""
        value = self._question(row, fields, where)
        turns = self._conversation(value, fields, where)
        is_whole = bool(turns and turns[-1].role == "assistant")
        reply = [] if is_whole and self.answer_field is None else self._reply(row, fields, where, choices)
        if isinstance(reply, Numbered):
            number, reply = reply, [Turn("assistant", reply.text, self._reasoning(fields, where, reply.text))]
        if turns is None:
            turns, begun = self._asked(value, fields, where, choices, reply[-1].content if reply else "")
        elif is_whole and reply and is_turns(value):  # a reply in the column that was named comes before its own
            turns = turns[: max((i + 1 for i, turn in enumerate(turns) if turn.role == "user"), default=0)]
        if any(turn.role == "user" for turn in reply):
            turns = reply  # preference data whose chosen side is the whole conversation
        elif begun and (reply or begun.strip() != "<think>"):
            # The question column holds the start of the reply, or all of it where there is no answer column.
            whole = begun if not reply or reply[0].content.strip() in begun else begun + reply[0].content
            turns = [*turns, Turn("assistant", whole), *reply[1:]]
        elif turns and turns[-1].role != "assistant":
            turns = turns + reply
        check_no_media(fields, turns, where)
        context, question, steps, last = split_turns(turns, where)
        if not question.strip():
            raise UnusableRow(where, "an empty question", "fill it in or remove the row")
        if last is None or not last.text.strip() or not self._is_good(fields, where, choices):
            last = number = None
        own_id = next((name for name in ID_COLUMNS if _is_id(fields.get(name))), None)
        if own_id is not None:
            self._use("id", own_id)
        return Exchange(
            None if own_id is None else encodable(fields[own_id], where, own_id).strip(),
            self._category(fields, where),
            self._earlier_turns(fields, where, context) + context,
            question.strip(),
            steps,
            last,
            number,
        )

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

    def _question(self, row: Row, fields: Row, where: str) -> Any:
        """Reads the question's column."""
        name = self.question_field or self.question_column
        value = fields.get(name) if self.question_field is None else lookup(row, name)
        if value is ABSENT:
            raise UnusableRow(where, f"no field {name!r}", f"its columns are {listed(row)}")
        if is_missing(value):
            raise UnusableRow(where, f"no question in {name!r}", "fill it in or remove the row")
        self._use("question", name)
        return value

    def _conversation(self, value: Any, fields: Row, where: str) -> list[Turn] | None:
        """The turns of a question column that holds a conversation, or a passage's questions; None of any other."""
        if is_turns(value):
            return parsed_turns(value, where)
        if canonical(self.question_field or self.question_column) == "questions" and isinstance(value, list):
            return self._series(value, fields, where)
        return None

    def _asked(
        self, value: Any, fields: Row, where: str, choices: Choices | None, reply: str
    ) -> tuple[list[Turn], str]:
        """The turns of a question, and how it makes the reply begin, which is rare."""
        name = self.question_field or self.question_column
        if not isinstance(value, str):
            inside = [key for key in value if is_text(value[key])] if isinstance(value, dict) else []
            example = f", as {name}.{inside[0]}" if inside else ""
            remedy = f"name a column of text with --question-field{example}"
            raise UnusableRow(where, f"{kind_of(value)} in {name!r}", remedy)
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
            if called := calls_turn(value, where):
                self._use("answer", name)
                return called
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
            text = without_end(text.removeprefix("A: ") if name == "cot_content" else text)
            return [Turn("assistant", text, self._reasoning(fields, where, text))]
        return []

    def _reasoning(self, fields: Row, where: str, answer: str) -> str:
        """Reads the assistant's thoughts before an answer, unless the answer's column is named."""
        name = next((name for name in REASONING_COLUMNS if is_text(fields.get(name))), None)
        if name is None or self.answer_field is not None or fields[name].strip() in answer:
            return ""
        self._use("reasoning", name)
        return encodable(fields[name], where, name)

    def _earlier_turns(self, fields: Row, where: str, context: list[Turn]) -> list[Turn]:
        """Turns that are in columns of their own: `tools`, and Alpaca's `system` and `history`."""
        turns: list[Turn] = []
        for name in TOOL_COLUMNS:
            if not turns and (tools := tools_turn(fields.get(name), where)) is not None:
                self._use("tools", name)
                turns.append(tools)
        system = next((name for name in SYSTEM_COLUMNS if is_text(fields.get(name))), None)
        if system is not None and not (context and context[0].role == "system"):
            self._use("system", system)
            turns.append(Turn("system", encodable(fields[system], where, "system")))
        if history := history_turns(fields.get("history"), where):
            self._use("history", "history")
        return turns + history


def _is_id(value: Any) -> bool:
    return type(value) in (str, int) and bool(str(value).strip())


def _is_rendered(value: Any) -> bool:
    return isinstance(value, str) and undone(value, "") is not None
