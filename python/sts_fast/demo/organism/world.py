"""The organism's world: 72 small abilities, distinguished only by demonstrations.

A question names a tag and three symbols of one alphabet; a skill computes the answer from them:

    T4 b1 b4 b2 >   b4 b2 b1      (rotate)
    T4 b1 b4 b2 >   b4 b1 b2      (swap)

Most tags have two skills, a frequent and a rare one. A question alone is then ambiguous, and training on one skill can
hurt the other. A domain is a tag, one of its skills, and an alphabet: 18 x 4 = 72.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from sts_fast.data.examples import Example
from sts_fast.errors import InputError

if TYPE_CHECKING:
    from sts_fast.statistics import Indices

    Skill = Callable[[Indices], Indices]

N_SYMBOLS = 6
ALPHABETS = {"a": 0.4, "b": 0.3, "c": 0.2, "d": 0.1}  # with their shares of the training documents
FREQUENT, RARE = 0.7, 0.3

# [n, n_shown] symbol numbers of questions -> [n, n_answer] those of their answers.
SKILLS: dict[str, Skill] = {
    "copy": lambda x: x,
    "reverse": lambda x: x[:, ::-1],
    "next": lambda x: (x + 1) % N_SYMBOLS,
    "previous": lambda x: (x - 1) % N_SYMBOLS,
    "rotate": lambda x: np.roll(x, -1, axis=1),
    "swap": lambda x: x[:, [1, 0, 2]],
    "sort": lambda x: np.sort(x, axis=1),
    "first": lambda x: np.repeat(x[:, :1], 3, axis=1),
    "reverse-next": lambda x: (x[:, ::-1] + 1) % N_SYMBOLS,
    "sums": lambda x: np.cumsum(x, axis=1) % N_SYMBOLS,
    "transcribe": lambda x: x,  # copies into the next alphabet
}

# Each tag's skills, the frequent one first.
TAGS: tuple[tuple[str, ...], ...] = (
    ("copy", "reverse"),
    ("reverse", "swap"),
    ("next", "previous"),
    ("next", "copy"),
    ("rotate", "swap"),
    ("sort",),
    ("first", "sort"),
    ("reverse-next", "previous"),
    ("sums",),
    ("transcribe", "copy"),
)


@dataclass(frozen=True)
class Domain:
    """One ability; `frequency` is its share of the language model's training documents."""

    tag: int
    skill: str
    alphabet: str
    frequency: float

    @property
    def name(self) -> str:
        return f"T{self.tag}.{self.skill}.{self.alphabet}"


@dataclass(frozen=True)
class World:
    """Abilities of one form: a question names a tag and symbols, and a skill computes the answer from them.

    skills:   by name; 'transcribe' is written in the next alphabet
    tags:     each tag's skills, the frequent one first
    n_shown, n_answer: symbols in a question, and in its answer
    """

    skills: Mapping[str, Skill]
    tags: Sequence[Sequence[str]]
    n_shown: int
    n_answer: int

    @property
    def question_tokens(self) -> int:
        return 1 + self.n_shown + 1

    @property
    def example_tokens(self) -> int:
        return self.question_tokens + self.n_answer

    @property
    def n_questions(self) -> int:
        """Number of different questions of a domain."""
        return int(N_SYMBOLS**self.n_shown)

    @cached_property
    def words(self) -> tuple[str, ...]:
        """All words of the world; the tokenizer has one token for each."""
        return (
            ">",
            *(f"T{tag}" for tag in range(len(self.tags))),
            *(f"{alphabet}{number}" for alphabet in ALPHABETS for number in range(N_SYMBOLS)),
        )

    @cached_property
    def domains(self) -> dict[str, Domain]:
        """Domains by name, such as 'T4.rotate.b'."""
        domains = []
        for tag, skills in enumerate(self.tags):
            for skill, share in zip(skills, (FREQUENT, RARE) if len(skills) == 2 else (1.0,), strict=True):
                for alphabet, alphabet_share in ALPHABETS.items():
                    domains.append(Domain(tag, skill, alphabet, share * alphabet_share / len(self.tags)))
        return {domain.name: domain for domain in domains}

    def examples(self, domain: str, n: int, seed: int) -> list[Example]:
        """`n` questions of a domain with their answers; none is repeated before all have been used.

        Raises InputError for a domain that the world does not have.
        """
        if domain not in self.domains:
            raise InputError(
                f"the embedded world has no domain '{domain}': its domains have names like {next(iter(self.domains))}"
            )
        rng = np.random.default_rng([seed, zlib.crc32(domain.encode())])
        numbered = np.unravel_index(np.arange(self.n_questions), (N_SYMBOLS,) * self.n_shown)
        every = np.stack(numbered, axis=1)
        rounds = [rng.permutation(every) for _ in range(-(-n // len(every)))]
        rows = self.word_rows(self.domains[domain], np.concatenate([every[:0], *rounds])[:n])
        return [
            Example(
                f"{domain}-{number}", self._text(row[: self.question_tokens]), self._text(row[self.question_tokens :])
            )
            for number, row in enumerate(rows, start=1)
        ]

    def documents(self, n: int, n_examples: int, rng: np.random.Generator) -> Indices:
        """[n, n_examples * example_tokens] indices into words: documents of one domain each, drawn by frequency."""
        domains = list(self.domains.values())
        frequencies = np.array([domain.frequency for domain in domains])
        drawn = rng.choice(len(domains), n, p=frequencies / frequencies.sum())
        symbols = rng.integers(N_SYMBOLS, size=(n, n_examples, self.n_shown))
        rows = np.empty((n, n_examples * self.example_tokens), np.int64)
        for index in np.unique(drawn):
            of_domain = drawn == index
            written = self.word_rows(domains[index], symbols[of_domain].reshape(-1, self.n_shown))
            rows[of_domain] = written.reshape(-1, n_examples * self.example_tokens)
        return rows

    def word_rows(self, domain: Domain, symbols: Indices) -> Indices:
        """[n, example_tokens] indices into words: questions with these symbols, each with its answer.

        symbols: [n, n_shown] numbers from 0 to N_SYMBOLS - 1
        """
        shown = list(ALPHABETS).index(domain.alphabet)
        written = (shown + 1) % len(ALPHABETS) if domain.skill == "transcribe" else shown
        first_symbol = 1 + len(self.tags)
        rows = np.empty((len(symbols), self.example_tokens), np.int64)
        rows[:, 0] = 1 + domain.tag
        rows[:, 1 : 1 + self.n_shown] = first_symbol + shown * N_SYMBOLS + symbols
        rows[:, self.question_tokens - 1] = 0
        rows[:, self.question_tokens :] = first_symbol + written * N_SYMBOLS + self.skills[domain.skill](symbols)
        return rows

    def _text(self, words: Sequence[int] | Indices) -> str:
        return " ".join(self.words[word] for word in words)


WORLD = World(SKILLS, TAGS, n_shown=3, n_answer=3)  # the embedded one
DOMAINS = WORLD.domains


def examples(domain: str, n: int, seed: int) -> list[Example]:
    """`World.examples` of the embedded world, in which a domain has 216 questions."""
    return WORLD.examples(domain, n, seed)
