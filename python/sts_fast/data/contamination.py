"""Contamination: training examples that ask what an evaluation asks, found by n-grams of words in common."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

# n, as in the decontamination of GPT-3's training data (Brown et al. 2020, appendix C).
N_WORDS = 13
# An n-gram of more questions of a set than FEW, and than this share of them, is an instruction that all begin with.
INSTRUCTION, FEW = 0.1, 3
SAME = f"{N_WORDS} words in a row, or all where there are fewer"
_WORD = re.compile(r"\w+|[-+*/=<>^%×÷−]")  # signs of arithmetic tell short questions apart

Ngram = tuple[str, ...]


@dataclass(frozen=True)
class NgramIndex:
    """The n-grams of several sets' questions; of a shorter question, all of its words.

    sets_of: by n-gram, the names of the sets that have it
    """

    sets_of: Mapping[Ngram, Sequence[str]]

    @classmethod
    def of(cls, questions: Mapping[str, Sequence[str]]) -> NgramIndex:
        """questions: by name of the set"""
        sets_of: dict[Ngram, list[str]] = {}
        for name, of_set in questions.items():
            counts = Counter(ngram for question in of_set for ngram in set(_ngrams(question)))
            most = max(FEW, INSTRUCTION * len(of_set))
            for ngram, n in counts.items():
                if n <= most:
                    sets_of.setdefault(ngram, []).append(name)
        return cls(sets_of)

    def sets_with(self, question: str) -> set[str]:
        """Names of the sets that share an n-gram with the question."""
        return {name for ngram in _ngrams(question) for name in self.sets_of.get(ngram, ())}

    def shared(self, questions: Iterable[str]) -> dict[str, list[int]]:
        """By set, the indices of the questions that share an n-gram with it; sets without any are left out."""
        found: dict[str, list[int]] = {}
        for at, question in enumerate(questions):
            for name in sorted(self.sets_with(question)):
                found.setdefault(name, []).append(at)
        return found


def _ngrams(question: str) -> list[Ngram]:
    words = _WORD.findall(question.casefold())
    n = len(words) - N_WORDS
    return [tuple(words[i : i + N_WORDS]) for i in range(n + 1)] if n > 0 else [tuple(words)] if words else []
