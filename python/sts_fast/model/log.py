"""Records of the tokens that were read of each prompt, and of how well answers were predicted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sts_fast.data.prompts import Prompt, PromptSet
from sts_fast.model.reader import PairedRows

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

    from sts_fast.statistics import Doubles


class PromptLog:
    """Record of the tokens of each prompt that were read in the end, for prompts.parquet."""

    def __init__(self, prompt_set: PromptSet) -> None:
        self.name, self.prompts = prompt_set.name, prompt_set.prompts
        n = len(self.prompts)
        self.kept: list[NDArray[np.bool_]] = [np.zeros(0, bool)] * n
        self.kept_paired: list[NDArray[np.bool_]] = [np.zeros(0, bool)] * n
        self.n_read = np.zeros(n, np.int64)
        self.n_pairs = np.zeros(n, np.int64)
        self.n_sinks = np.zeros(n, np.int64)

    @classmethod
    def of_all(cls, prompt_set: PromptSet) -> PromptLog:
        """The log of a set whose positions are all read."""
        log = cls(prompt_set)
        log.kept = [np.ones(len(prompt.positions), bool) for prompt in prompt_set.prompts]
        log.kept_paired = [np.ones(len(prompt.paired), bool) for prompt in prompt_set.prompts]
        log.n_read = np.asarray([len(prompt.positions) for prompt in prompt_set.prompts], np.int64)
        log.n_pairs = np.asarray([len(prompt.paired) for prompt in prompt_set.prompts], np.int64)
        return log

    @classmethod
    def joined(cls, parts: Sequence[PromptLog], whole: PromptSet) -> PromptLog:
        """The log of a set, from those of consecutive parts of its prompts."""
        log = cls(whole)
        log.kept = [kept for part in parts for kept in part.kept]
        log.kept_paired = [kept for part in parts for kept in part.kept_paired]
        log.n_read, log.n_pairs, log.n_sinks = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("n_read", "n_pairs", "n_sinks")
        )
        return log

    def record(self, rows: PairedRows) -> None:
        for index, kept, kept_paired in zip(rows.prompts, rows.kept, rows.kept_paired, strict=True):
            self.kept[index], self.kept_paired[index] = kept, kept_paired
            self.n_read[index], self.n_pairs[index] = kept.sum(), kept_paired.sum()
            self.n_sinks[index] = (~kept).sum()

    def counts(self) -> dict[str, int]:
        return {
            "n_tokens": int(self.n_read.sum()),
            "n_pairs": int(self.n_pairs.sum()),
            "n_special": sum(prompt.n_special for prompt in self.prompts),
            "n_straddling": sum(prompt.n_straddling for prompt in self.prompts),
            "n_sinks": int(self.n_sinks.sum()),
        }

    def table(self, stage: str, values: Mapping[str, Doubles], *, name: str | None = None) -> pa.Table:
        """Rows of a stage of prompts.parquet, with further columns; name: of the set, if not its own."""
        import pyarrow as pa

        def tokens(read: Callable[[int, Prompt], NDArray[np.int32]]) -> pa.Array:
            return pa.array([read(i, prompt) for i, prompt in enumerate(self.prompts)], pa.list_(pa.int32()))

        paired = [
            _pair_positions(prompt, len(kept)) for prompt, kept in zip(self.prompts, self.kept_paired, strict=True)
        ]
        columns = {
            "stage": pa.array([stage] * len(self.prompts)),
            "domain": pa.array([name or self.name] * len(self.prompts)),
            "id": pa.array([prompt.id for prompt in self.prompts]),
            "question": pa.array([prompt.question for prompt in self.prompts], pa.string()),
            "base_ids": tokens(lambda i, prompt: prompt.base_ids),
            "demos_ids": tokens(lambda i, prompt: prompt.demos_ids),
            "positions": tokens(lambda i, prompt: prompt.positions[self.kept[i]]),
            "paired": tokens(lambda i, prompt: paired[i][0][self.kept_paired[i]]),
            "paired_demos": tokens(lambda i, prompt: paired[i][1][self.kept_paired[i]]),
            "draw": pa.array([prompt.draw for prompt in self.prompts], pa.int64()),
            "n_special": pa.array([prompt.n_special for prompt in self.prompts], pa.int64()),
            "n_straddling": pa.array([prompt.n_straddling for prompt in self.prompts], pa.int64()),
            "n_sinks": pa.array(self.n_sinks),
        }
        return pa.table(columns | {column: pa.array(of) for column, of in values.items()})


def prompts_of(table: pa.Table) -> list[Prompt]:
    """The prompts of a `PromptLog.table`, whose positions are those that were read.

    Raises KeyError where a column is missing, TypeError or ValueError where a value is of another type.
    """
    columns = ("id", "question", "base_ids", "demos_ids", "positions", "paired", "paired_demos", "draw")
    prompts = []
    for row in table.select([*columns, "n_special", "n_straddling"]).to_pylist():
        ids = {name: np.asarray(row[name], np.int32) for name in ("base_ids", "demos_ids", "positions", "paired")}
        prompts.append(
            Prompt(
                row["id"], ids["base_ids"], ids["demos_ids"], ids["positions"], ids["paired"],
                np.asarray(row["paired_demos"], np.int32), row["n_special"], row["n_straddling"], row["question"],
                row["draw"],
            )
        )  # fmt: skip
    return prompts


@dataclass(frozen=True)
class AnswerLog:
    """Record of how well the base model predicted each answer; see answers.answer_outcomes.

    nll: [n_prompts] nats; n_tokens: [n_prompts] answer tokens; exact: [n_prompts]
    """

    prompt_set: PromptSet
    nll: Doubles
    n_tokens: NDArray[np.int64]
    exact: NDArray[np.bool_]

    @property
    def loss(self) -> Doubles:
        """[n_prompts] loss per token of the answer, in nats"""
        return self.nll / self.n_tokens

    @property
    def p_answer(self) -> Doubles:
        """[n_prompts] probability of the whole answer"""
        return np.exp(-self.nll)

    def table(self) -> pa.Table:
        log = PromptLog(self.prompt_set)
        log.kept = PromptLog.of_all(self.prompt_set).kept
        return log.table("answer", {"answer_nll_sum": self.nll, "answer_exact": self.exact.astype(np.float64)})


def _pair_positions(prompt: Prompt, n_pairs: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    # With a tuned model every position is paired with itself, and there are no demonstrations.
    if len(prompt.demos_ids):
        return prompt.paired, prompt.paired_demos
    return prompt.positions[:n_pairs], prompt.positions[:n_pairs]
