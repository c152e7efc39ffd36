"""Makes examples of rows: training sets, and the domains whose change is forecast."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeGuard

from sts_fast.data.choices import Numbered, answers_of
from sts_fast.data.columns import ReadRows, row_warnings
from sts_fast.data.folders import Origin, Use
from sts_fast.data.row_reader import Exchange, RowReader
from sts_fast.data.sources import Place, Places, domains_of, origin_of
from sts_fast.data.turns import ToolCall, Turn
from sts_fast.data.values import without_margin
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
    row:      number of its row in the set, from 1; 0 where it was made otherwise
    """

    id: str
    question: str
    answer: str | None
    context: tuple[Turn, ...] = ()
    steps: tuple[Turn, ...] = ()
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    row: int = field(default=0, compare=False, repr=False)

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


def _with_truths(rows: list[tuple[str | None, Example]]) -> list[tuple[str | None, Example]]:
    """Of a CSV whose answers are all True or False, as truth values are written there, those answers as yes and no."""
    truths: dict[str | None, str | None] = {"True": "yes", "False": "no", None: None}
    if not all(example.answer in truths for _, example in rows):
        return rows
    return [(category, replace(example, answer=truths[example.answer])) for category, example in rows]


def _example(exchange: Exchange, key: str | None, row: int) -> Example:
    reply = exchange.reply
    return Example(
        id=key or str(row) if exchange.id is None else exchange.id,
        question=exchange.question,
        answer=None if reply is None else without_margin(reply.content if reply.content.strip() else reply.text),
        context=tuple(exchange.context),
        steps=tuple(exchange.steps),
        reasoning="" if reply is None else reply.reasoning.strip(),
        tool_calls=() if reply is None else reply.tool_calls,
        row=row,
    )


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
        reader = RowReader(table, question_field, answer_field, by_category=by_category)
        number = 0
        for number, key, row in table.read():
            read.n_rows += 1
            try:
                exchange = reader.read(row, f"{table}: row {number}")
            except UnusableRow as error:
                unusable.append(error)
                continue
            if exchange.number is not None:
                numbers[len(rows)] = exchange.number
            rows.append((exchange.category, _example(exchange, key, n_before + number)))
        reader.check_answer_field()
        reader.add_to(read)
        n_before += number
    answers, read.notes = answers_of([*numbers.values()])
    for at, answer in zip(numbers, answers, strict=True):
        if isinstance(answer, UnusableRow):
            unusable.append(answer)
        else:
            rows[at] = rows[at][0], replace(rows[at][1], answer=answer)
    if all(table.is_text for table in origin.tables) and "options" not in read.columns.by_role:
        rows = _with_truths(rows)
    dropped = {at for at, answer in zip(numbers, answers, strict=True) if isinstance(answer, UnusableRow)}
    if strict and unusable:
        raise unusable[0]
    read.left_out.update(error.reason for error in unusable)
    if not read.n_rows:
        raise InputError(f"{listed(origin.tables)} holds no examples; give a file with at least one row")
    if read.n_left_out == read.n_rows:
        raise InputError(f"{listed(origin.tables)} has no usable row among {read.n_rows}: {unusable[0]}")
    return [row for at, row in enumerate(rows) if at not in dropped], read
