"""Questions that stand in two sets: the same words in a row."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

# Words in a row that two questions must share to be called the same, as the decontamination of GPT-3's data had it.
SAME_WORDS = 13
# Runs that stand in more than a few, and a larger share, of a set's questions are an instruction that comes with each.
INSTRUCTION, FEW = 0.1, 3
SAME = f"{SAME_WORDS} words in a row, or all of a shorter one"
_WORD = re.compile(r"\w+")

Run = tuple[str, ...]


@dataclass(frozen=True)
class Wording:
    """sets_of: of each run of SAME_WORDS words of a question, or the whole of a shorter one, the sets that have it."""

    sets_of: Mapping[Run, Sequence[str]]

    @classmethod
    def of(cls, questions: Mapping[str, Sequence[str]]) -> Wording:
        """questions: by set"""
        sets_of: dict[Run, list[str]] = {}
        for name, of_set in questions.items():
            counts = Counter(run for question in of_set for run in set(_runs(question)))
            most = max(FEW, INSTRUCTION * len(of_set))
            for run, n in counts.items():
                if n <= most:
                    sets_of.setdefault(run, []).append(name)
        return cls(sets_of)

    def sets_with(self, question: str) -> set[str]:
        """Names of the sets that share a run with the question."""
        return {name for run in _runs(question) for name in self.sets_of.get(run, ())}

    def shared(self, questions: Iterable[str]) -> dict[str, list[int]]:
        """By set, the places of the questions that share a run with it; none of a set without."""
        found: dict[str, list[int]] = {}
        for at, question in enumerate(questions):
            for name in sorted(self.sets_with(question)):
                found.setdefault(name, []).append(at)
        return found


def _runs(question: str) -> list[Run]:
    words = _WORD.findall(question.casefold())
    n = len(words) - SAME_WORDS
    return [tuple(words[i : i + SAME_WORDS]) for i in range(n + 1)] if n > 0 else [tuple(words)] if words else []
