"""Reads rollouts, (prompt, completion, reward) rows, as trainers write them: TRL's logged completions, verl's dumps.

| what                | found under                                                                               |
|---------------------|-------------------------------------------------------------------------------------------|
| prompt              | `prompt`, `input`, `question`, ...: text, or a conversation as a list of messages          |
| completion          | `completion`, `output`, `response`, ...: likewise; or a list of several, one reward each   |
| reward              | `reward`, `score`, ...; else the sum of columns with "reward" in their name; else of those |
|                     | that TRL writes between `completion` and `advantage`                                       |
| advantage           | `advantage`: then it is taken as the trainer had it                                        |
| group               | `uid`, `group_id`, ...; else completions of the same prompt at the same `step` are one     |
| whether it was cut  | `truncated`, or `finish_reason` "length"                                                   |

All formats that `examples` reads are accepted. Of a folder all files are read; no group spans two of them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from sts_fast import files
from sts_fast.data.folders import DESCRIPTIONS, Origin
from sts_fast.data.options import Option
from sts_fast.data.rendered import undone
from sts_fast.data.sources import Places, origin_of
from sts_fast.data.tables import Row, Table, exists, listdir, suffix_of
from sts_fast.data.turns import Turn, is_turns, messages_of, parsed_turns
from sts_fast.data.values import ABSENT, encodable, is_missing, kind_of, lookup
from sts_fast.errors import InputError, UnusableRow, listed
from sts_fast.signed.objectives import group_advantages, group_spread

if TYPE_CHECKING:
    from sts_fast.statistics import Doubles, Indices

Prompt = str | tuple[Turn, ...]

# Column names in lower case; the first that a file has is taken.
PROMPT_COLUMNS = ("prompt", "prompts", "input", "inputs", "question", "problem", "query", "messages")
COMPLETION_COLUMNS = (
    *("completion", "completions", "output", "outputs", "response", "responses"),
    *("generation", "generations", "generated_text"),
)
REWARD_COLUMNS = ("reward", "rewards", "total_reward", "score", "scores", "is_correct", "correct")
ADVANTAGE_COLUMNS = ("advantage", "advantages")
GROUP_COLUMNS = ("group_id", "group", "uid", "prompt_id")
STEP_COLUMNS = ("step", "global_step")
CUT_COLUMNS = ("truncated", "is_truncated")
FINISH_COLUMNS = ("finish_reason", "stop_reason")
TRUTH_VALUES = {"true": 1.0, "false": 0.0}
CUT_REASONS = ("length", "max_tokens", "max_length")


@dataclass(frozen=True)
class Columns:
    """Columns to read, where their names do not tell; `a.b` is field b of column a.

    rewards: their sum is the reward
    """

    prompt: Annotated[str | None, Option("Column of the prompts.", "--prompt-field")] = None
    completion: Annotated[str | None, Option("Column of the completions.", "--completion-field")] = None
    rewards: Annotated[Sequence[str], Option("Column of the rewards; several are added up.", "--reward-field")] = ()
    group: Annotated[str | None, Option("Column that groups the completions of a prompt.", "--group-field")] = None


@dataclass(frozen=True)
class Rollout:
    """One completion of a policy.

    prompt:     the text that was sent, or turns, the last of them the user's or a tool's
    completion: text, without the end-of-text mark where the trainer dropped it; may be empty
    reward:     as the checker gave it; advantage: as the trainer recorded it, if it did
    group:      number of the prompt that it answers, from 0 in order of appearance
    truncated:  whether it was cut off at the longest length; None where that is not known
    """

    prompt: Prompt
    completion: str
    reward: float
    group: int
    advantage: float | None = None
    truncated: bool | None = None


@dataclass(frozen=True)
class Rollouts:
    """Rewarded completions, those of one prompt side by side.

    read_as:      column that each role (prompt, reward, ...) was read from
    n_unrewarded: completions left out because they have no reward
    origin:       the tables that they were read from
    """

    rows: list[Rollout]
    read_as: dict[str, str] = field(default_factory=dict)
    n_unrewarded: int = 0
    origin: Origin = field(default_factory=Origin)

    @property
    def rewards(self) -> Doubles:
        return np.asarray([row.reward for row in self.rows], np.float64)

    @property
    def group_of(self) -> Indices:
        return np.asarray([row.group for row in self.rows], np.int64)

    @property
    def advantages(self) -> Doubles:
        """[n_rows] as the trainer recorded them, else normalised within each group; see objectives.group_advantages."""
        if any(row.advantage is None for row in self.rows):
            return group_advantages(self.rewards, self.group_of)
        return np.asarray([row.advantage for row in self.rows], np.float64)

    def save(self, path: str | Path) -> None:
        """Writes the rows as a .jsonl that `load_rollouts` reads. Raises InputError where that fails."""
        with files.atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
            for row in self.rows:
                prompt = row.prompt
                turns = prompt if isinstance(prompt, str) else messages_of(prompt)
                known = {"advantage": row.advantage, "truncated": row.truncated}
                line = {"group": row.group, "prompt": turns, "completion": row.completion, "reward": row.reward}
                line |= {name: value for name, value in known.items() if value is not None}
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")

    def counts(self) -> dict[str, int]:
        """Numbers known before the model reads the rows; a prompt is settled where all its advantages are the same."""
        sizes = np.bincount(self.group_of)
        return {
            "n_completions": len(self.rows),
            "n_unrewarded": self.n_unrewarded,
            "n_groups": len(sizes),
            "n_lone": int((sizes == 1).sum()),
            "n_settled": int(((group_spread(self.advantages, self.group_of) == 0) & (sizes > 1)).sum()),
            "n_empty": sum(not row.completion.strip() for row in self.rows),
            "n_truncated": sum(row.truncated is True for row in self.rows),
        }


def load_rollouts(source: Places, columns: Columns = Columns()) -> Rollouts:
    """The rollouts of one file, of all files in a folder, of rows in memory, or of several of these.

    source: as for load_examples, but that of a folder all files are read
    Raises InputError, naming file and row, for whatever cannot be read as such, and where no row has a reward.
    """
    origin, by_group = _origin(source), _RolloutsByGroup()
    n_rows = 0
    for table in origin.tables:
        reader = _RowReader(table, columns)
        for number, _, row in table.read():
            where = f"{table}: row {number}"
            if isinstance(row, UnusableRow):
                raise row
            if not isinstance(row, dict):
                raise InputError(f"{where} is {kind_of(row)}; every row must be an object with named fields")
            n_rows += 1
            for key, prompt, rollout in reader.read(row, where):
                by_group.add((str(table), *key), prompt, rollout, where)
        by_group.read_as |= reader.read_as
    if not n_rows:
        raise InputError(f"{origin} contains no rollouts; give a file with at least one row")
    if not by_group.rows:
        raise InputError(f"{origin} has no reward in any row; fill in {by_group.read_as.get('reward', 'the rewards')}")
    with_advantage = [rollout.advantage is not None for rollout in by_group.rows]
    if any(with_advantage) and not all(with_advantage):
        raise InputError(
            f"{origin} has an advantage in some rows but not in all; fill them in, or name the rewards with "
            "--reward-field, from which advantages are then computed"
        )
    in_order = sorted(by_group.rows, key=lambda rollout: rollout.group)
    return Rollouts(in_order, by_group.read_as, by_group.n_unrewarded, origin)


def _origin(source: Places) -> Origin:
    """The tables of rollouts: of a folder of files all of them, for a trainer writes one for each step."""
    if isinstance(source, (list, tuple)) and source and isinstance(source[0], (str, Path)):
        origins = [_origin(place) for place in source]
        return Origin([table for origin in origins for table in origin.tables])
    folder = Path(source) if isinstance(source, (str, Path)) else None
    if folder is None or not exists(folder) or not folder.is_dir():
        return origin_of(source, "train", "rollouts")
    files = [
        file
        for file in listdir(folder)
        if suffix_of(file) and not file.name.startswith(".") and file.name not in DESCRIPTIONS
    ]
    if not files:
        return origin_of(source, "train", "rollouts")
    # 2.jsonl before 10.jsonl: dumps are named after their step.
    files.sort(key=lambda file: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", file.name)])
    return Origin([Table.of_file(file) for file in files])


class _RolloutsByGroup:
    """Rollouts by group, as they are read."""

    def __init__(self) -> None:
        self.rows: list[Rollout] = []
        self.read_as: dict[str, str] = {}
        self.n_unrewarded = 0
        self.groups: dict[tuple[str, ...], tuple[int, Prompt]] = {}

    def add(self, key: tuple[str, ...], prompt: Prompt, rollout: Rollout | None, where: str) -> None:
        if rollout is None:
            self.n_unrewarded += 1
            return
        group, first_prompt = self.groups.setdefault(key, (len(self.groups), prompt))
        if first_prompt != prompt:
            raise InputError(
                f"{where} has a different prompt from earlier rows of its group {key[-1]!r}; name the column of "
                "the groups with --group-field"
            )
        self.rows.append(replace(rollout, group=group))


class _RowReader:
    """Makes rollouts of the rows of one file; its first row decides which columns are read."""

    def __init__(self, table: Table, columns: Columns) -> None:
        self.table, self.named = table, columns
        self.prompt = self.completion = self.advantage = self.group = self.step = ""
        self.rewards: list[str] = []
        self.known = False

    @property
    def read_as(self) -> dict[str, str]:
        used = {"prompt": self.prompt, "completion": self.completion, "reward": " + ".join(self.rewards)}
        used |= {"advantage": self.advantage, "group": self.group, "step": self.step}
        return {what: column for what, column in used.items() if column}

    def read(self, row: Row, where: str) -> Iterator[tuple[tuple[str, ...], Prompt, Rollout | None]]:
        """(group, prompt, rollout) of each completion of a row; None instead of a rollout where it has no reward."""
        if not self.known:
            self._choose(row)
        prompt, begun = self._prompt(row, where)
        completions = self._completions(row, where)
        rewards = self._numbers(row, self.rewards, len(completions), where)
        advantages = self._numbers(row, [self.advantage] if self.advantage else [], len(completions), where)
        step, group = (_label(row, name, where) for name in (self.step, self.group))
        key = (step, group or repr(prompt))
        for completion, reward, advantage in zip(completions, rewards, advantages, strict=True):
            known = reward if self.rewards else advantage
            if known is None:
                yield key, prompt, None
                continue
            # A conversation that went on is one prompt with the last reply as its completion.
            earlier, text = completion
            turns = (*_turns_of(prompt), *earlier) if earlier else prompt
            yield key, prompt, Rollout(turns, begun + text, known, 0, advantage, _truncated(row, where))

    def _choose(self, row: Row) -> None:
        self.known = True
        columns = {str(name).strip().lower(): str(name) for name in row}

        def first(names: Sequence[str]) -> str:
            return next((columns[name] for name in names if name in columns), "")

        self.prompt = self.named.prompt or first(PROMPT_COLUMNS)
        self.completion = self.named.completion or first(COMPLETION_COLUMNS)
        self.group, self.step = self.named.group or first(GROUP_COLUMNS), first(STEP_COLUMNS)
        self.advantage = "" if self.named.rewards else first(ADVANTAGE_COLUMNS)
        self.rewards = list(self.named.rewards) or self._reward_columns(row, columns, first(REWARD_COLUMNS))
        if len({*self.rewards}) < len(self.rewards):
            raise InputError(f"--reward-field {', '.join(self.rewards)} adds up the same column twice: name each once")
        for what, column, option in (
            ("prompts", self.prompt, "--prompt-field"),
            ("completions", self.completion, "--completion-field"),
            ("rewards", self.rewards or self.advantage, "--reward-field"),
        ):
            if not column:
                raise InputError(
                    f"{self.table} has no column that is known to contain {what}, only {listed(row)}; name one with "
                    f"{option}"
                )

    def _reward_columns(self, row: Row, columns: dict[str, str], known: str) -> list[str]:
        if known:
            return [known]
        named_so = [column for name, column in columns.items() if "reward" in name]
        if named_so or not self.advantage:
            return named_so
        order = list(columns.values())
        start, end = (order.index(name) if name in order else -1 for name in (self.completion, self.advantage))
        between = order[start + 1 : end] if start >= 0 else []
        return [name for name in between if row[name] is None or isinstance(row[name], (bool, int, float))]

    def _value(self, row: Row, name: str, where: str) -> Any:
        value = lookup(row, name)
        if value is ABSENT:
            raise InputError(f"{where} has no field {name!r}; its columns are {listed(row)}")
        return value

    def _prompt(self, row: Row, where: str) -> tuple[Prompt, str]:
        """The prompt, and the text that it makes the completion begin with, which is rare."""
        value = self._value(row, self.prompt, where)
        if is_missing(value):
            raise InputError(f"{where} has no prompt in {self.prompt!r}; fill it in or remove the row")
        begun = ""
        if is_turns(value):
            turns = parsed_turns(value, where)
        elif isinstance(value, str):
            text = encodable(value, where, self.prompt)
            rendered = undone(text, where) if text.lstrip().startswith("<|im_start|>") else None
            if rendered is None:
                return text, ""
            turns, begun = rendered
        else:
            raise InputError(
                f"{where} contains {kind_of(value)} in {self.prompt!r}; name a column of text or messages with "
                "--prompt-field"
            )
        if not any(turn.role == "user" and turn.content.strip() for turn in turns):
            raise InputError(
                f"{where} has a prompt without a user turn, or an empty one; every prompt needs text from the user"
            )
        if turns[-1].role == "assistant":
            raise InputError(
                f"{where} has a prompt that ends with a reply; its completion must be the reply, in a column of its own"
            )
        return tuple(turns), begun

    def _completions(self, row: Row, where: str) -> list[tuple[tuple[Turn, ...], str]]:
        """(turns before the last reply, last reply) of each of a row's completions."""
        value = self._value(row, self.completion, where)
        several = isinstance(value, list) and not is_turns(value) and bool(value)
        completions: list[tuple[tuple[Turn, ...], str]] = []
        for completion in value if several else [value]:
            if completion is None or isinstance(completion, str):
                completions.append(((), encodable(completion or "", where, self.completion)))
                continue
            if not is_turns(completion):
                raise InputError(
                    f"{where} contains {kind_of(completion)} in {self.completion!r}; name a column of text or messages "
                    "with --completion-field"
                )
            turns = parsed_turns(completion, where)
            if turns and turns[-1].role != "assistant":
                raise InputError(
                    f"{where} has a completion that ends with a turn of the {turns[-1].role}; it must end with a reply"
                )
            if turns and turns[-1].reasoning:
                raise InputError(
                    f"{where} has a completion whose reasoning is apart from its text; give the completion as it was "
                    "sampled, with the reasoning in it"
                )
            completions.append((tuple(turns[:-1]), turns[-1].text) if turns else ((), ""))
        return completions

    def _numbers(self, row: Row, names: Sequence[str], n: int, where: str) -> list[float | None]:
        """[n] the sum of the columns for each of a row's completions; None where none of them has a number."""
        totals: list[float | None] = [None] * n
        for name in names:
            value = self._value(row, name, where)
            values = value if isinstance(value, list) else [value]
            if len(values) != n and not is_missing(value):
                raise InputError(
                    f"{where} has {n} completions but {len(values)} numbers in {name!r}; give one for each"
                )
            for i, entry in enumerate(values if len(values) == n else [None] * n):
                if (number := _number(entry, where, name)) is not None:
                    totals[i] = (totals[i] or 0.0) + number
        return totals


def _number(value: Any, where: str, name: str) -> float | None:
    if is_missing(value):
        return None
    try:
        value = TRUTH_VALUES.get(value.strip().lower(), value) if isinstance(value, str) else value
        number = float(value) if isinstance(value, (bool, int, float, str)) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        shown = repr(value) if isinstance(value, (str, int, float)) else kind_of(value)
        raise InputError(
            f"{where} contains {shown[:40]} in {name!r}, which must be a finite number; name another column with "
            "--reward-field"
        )
    return number


def _label(row: Row, name: str, where: str) -> str:
    value = lookup(row, name) if name else None
    if value is None or value is ABSENT:
        return ""
    if not isinstance(value, (str, int, float)):
        raise InputError(f"{where} contains {kind_of(value)} in {name!r}; it must be a text or a number")
    return str(value)


def _truncated(row: Row, where: str) -> bool | None:
    columns = {str(name).strip().lower(): value for name, value in row.items()}
    cut = next((columns[name] for name in CUT_COLUMNS if name in columns), None)
    if isinstance(cut, (bool, int)):
        return bool(cut)
    reason = next((columns[name] for name in FINISH_COLUMNS if isinstance(columns.get(name), str)), None)
    return None if reason is None else reason.strip().lower() in CUT_REASONS


def _turns_of(prompt: Prompt) -> tuple[Turn, ...]:
    return (Turn("user", prompt),) if isinstance(prompt, str) else prompt
