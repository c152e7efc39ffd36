"""Columns that rows are read from, counts of the rows, and the lines and warnings that tell them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from sts_fast.data.choices import INDEX_COLUMNS
from sts_fast.data.folders import Origin
from sts_fast.data.turns import REASONING_KEYS, is_turns
from sts_fast.data.values import is_missing, is_text
from sts_fast.errors import listed

# Column names in canonical spelling; the first that a file has is taken.
TURN_COLUMNS = ("messages", "conversations", "conversation")
QUESTION_COLUMNS = (
    *("question", "problem", "query", "question_stem", "instruction", "prompt", "input", "inputs", "questions"),
)
# Of questions with options: HellaSwag, PIQA, WinoGrande, SWAG. Elsewhere these hold something else.
STEM_COLUMNS = ("ctx", "goal", "sentence", "startphrase")
# A reply that was written for training comes before a worked solution, and that before a bare result.
ANSWER_COLUMNS = (
    *("chosen", "completion", "response", "output"),
    *("cot_content", "generated_solution", "solution", "rationale", "canonical_solution", "long_answer", "code"),
    *("answer", "expected_answer", "correct_answer", "best_answer", "right_answer", "reference_answer", "gold_answer"),
    *("ground_truth", "target", "targets", "answers", "answers_spans", "final_decision", "mc1_targets"),
)
# Among them those whose texts are structures, as a CSV writes them.
STRUCTURED_COLUMNS = ("answers", "answers_spans", "mc1_targets")
# Texts that a question is about. They come before it, but after an `instruction`, as its input does.
PASSAGE_COLUMNS = (
    *("context", "contexts", "passage", "passages", "paragraph", "paragraphs", "article", "story", "document"),
    *("documents", "support", "background", "premise", "body", "dialogue"),
)
INPUT_COLUMNS = ("input", *PASSAGE_COLUMNS)
LABEL_COLUMNS = ("label", "kto_tag")
TOOL_COLUMNS = ("tools", "functions")
# What the assistant thinks before a reply that is in a column of its own.
REASONING_COLUMNS = (*REASONING_KEYS, "thoughts", "complex_cot", "chain_of_thought", "cot")
SYSTEM_COLUMNS = ("system", "system_prompt")
ID_COLUMNS = ("id", "question_id", "unique_id", "task_id", "problem_id", "example_id", "prompt_id", "uuid", "idx")
CATEGORY_COLUMNS = ("category", "subject", "domain", "topic")

# What columns are read for, in the order in which they are reported.
ROLES_OF_COLUMNS = (
    *("category", "id", "tools", "system", "history", "passage", "question", "options", "reasoning", "answer", "label"),
)

# Share of a set's rows, or questions, that may be left out without a warning.
UNREMARKABLE = 0.1
MOST_REASONS = 3


def canonical(name: object) -> str:
    """A column's name as it is looked up: in lower case, with _ for blanks and hyphens."""
    return str(name).strip().lower().replace(" ", "_").replace("-", "_")


@dataclass(frozen=True)
class ReadColumns:
    """Columns of the files of one set, as named there.

    by_role: those that examples were made of, by an entry of ROLES_OF_COLUMNS
    unread:  others that hold text, or name an answer
    """

    by_role: dict[str, list[str]] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        read = [f"{role} from {listed(names)}" for role, names in self.by_role.items()]
        return ", ".join(read) + (f"; not read: {listed(self.unread)}" if self.unread else "")


@dataclass
class ReadRows:
    """Rows of one source: a set, or a file that its categories split into several.

    origin:   the tables
    n_rows:   in these, blank lines aside
    left_out: number of rows without an example, by reason
    n_bad:    replies that their rows label as bad, and that are no answers
    notes:    what to know of how the others were read
    """

    origin: Origin = field(default_factory=Origin)
    columns: ReadColumns = field(default_factory=ReadColumns)
    n_rows: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    n_bad: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def n_left_out(self) -> int:
        return self.left_out.total()

    def reasons(self) -> str:
        """The commonest reasons, with the number of rows of each."""
        most = self.left_out.most_common(MOST_REASONS)
        n_more = self.n_left_out - sum(n for _, n in most)
        return ", ".join(f"{n:,} with {reason}" for reason, n in most) + (f", {n_more:,} more" if n_more else "")


class RowsBlock(TypedDict):
    """Counts and columns of the rows of one source, for scores.json; see ReadRows and ReadColumns.

    sets: names of the sets that its rows are in
    """

    sets: list[str]
    columns: dict[str, list[str]]
    unread: list[str]
    n_rows: int
    left_out: dict[str, int]
    n_bad: int
    notes: list[str]


def reading_lines(read: Sequence[tuple[str, ReadRows]]) -> list[str]:
    """A line for each way in which columns were read, with the sets that were read so, by (name, rows)."""
    groups: dict[str, list[tuple[list[str], ReadRows]]] = {}
    for names, rows in _by_source(read):
        groups.setdefault(str(rows.columns), []).append((names, rows))
    lines = []
    for columns, sources in groups.items():
        total = ReadRows(
            n_rows=sum(rows.n_rows for _, rows in sources),
            left_out=sum((rows.left_out for _, rows in sources), Counter()),
            n_bad=sum(rows.n_bad for _, rows in sources),
        )
        counts = [f"{total.n_rows:,} {'row' if total.n_rows == 1 else 'rows'}"]
        if total.n_bad:
            counts.append(f"{total.n_bad:,} {'reply' if total.n_bad == 1 else 'replies'} labelled bad")
        if total.left_out:
            counts.append(f"{total.n_left_out:,} left out: {total.reasons()}")
        names = [name for of_source, _ in sources for name in of_source]
        lines.append(f"{listed(names, most=4)}: {columns}; {', '.join(counts)}")
    return lines


def row_warnings(read: Sequence[tuple[str, ReadRows]], unremarkable: float = UNREMARKABLE) -> list[str]:
    """Warnings about the rows of some sets by (name, rows), each once.

    unremarkable: share of a source's rows that may be left out without a warning
    """
    noted: dict[str, list[str]] = {}
    lossy: list[tuple[str, ReadRows]] = []
    for names, rows in _by_source(read):
        name = f"'{listed(names, most=4)}'"
        for note in rows.notes:
            noted.setdefault(note, []).append(name)
        if rows.n_left_out > unremarkable * rows.n_rows:
            lossy.append((f"{rows.n_left_out:,} of the {rows.n_rows:,} rows of {name}", rows))
    warnings = [f"{listed(names, most=4)}: {note}" for note, names in noted.items()]
    if lossy:
        total = ReadRows(left_out=sum((rows.left_out for _, rows in lossy), Counter()))
        warnings.append(f"{listed([which for which, _ in lossy], most=4)} were left out: {total.reasons()}")
    return warnings


def row_blocks(read: Sequence[tuple[str, ReadRows]]) -> list[RowsBlock]:
    """The block of each source of some sets by (name, rows)."""
    return [
        {
            "sets": names,
            "columns": rows.columns.by_role,
            "unread": rows.columns.unread,
            "n_rows": rows.n_rows,
            "left_out": dict(rows.left_out),
            "n_bad": rows.n_bad,
            "notes": rows.notes,
        }
        for names, rows in _by_source(read)
    ]


def _by_source(read: Sequence[tuple[str, ReadRows]]) -> list[tuple[list[str], ReadRows]]:
    sources: dict[int, tuple[list[str], ReadRows]] = {}
    for name, rows in read:
        sources.setdefault(id(rows), ([], rows))[0].append(name)
    return [*sources.values()]


def is_readable(name: str, value: Any) -> bool:
    """True of texts, of lists of texts, and of what may be a passage or name an answer."""
    if name in (*PASSAGE_COLUMNS, *INDEX_COLUMNS):
        return not is_missing(value)
    return is_text(value) or is_turns(value) or (isinstance(value, list) and any(map(is_text, value)))
