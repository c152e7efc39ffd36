"""The organism's world: 72 small abilities, told apart only by demonstrations.

A question names a tag and three symbols of one alphabet, its answer is what a skill makes of them:

    T4 b1 b4 b2 >   b4 b2 b1      (rotate)
    T4 b1 b4 b2 >   b4 b1 b2      (swap)

Most tags stand for two skills, a frequent and a rare one, so that a question alone does not say which is meant, and
training on one skill can hurt its rival. A domain is a tag, one of its skills, and an alphabet: 18 x 4 = 72.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sts_fast.errors import InputError
from sts_fast.examples import Example

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]

N_SYMBOLS = 6
LENGTH = 3
QUESTION_TOKENS = 1 + LENGTH + 1
EXAMPLE_TOKENS = QUESTION_TOKENS + LENGTH
ALPHABETS = {"a": 0.4, "b": 0.3, "c": 0.2, "d": 0.1}  # with their share of the training documents
FREQUENT, RARE = 0.7, 0.3

# [n, LENGTH] symbol numbers of questions -> those of their answers.
SKILLS: dict[str, Callable[[Ints], Ints]] = {
    "copy": lambda x: x,
    "reverse": lambda x: x[:, ::-1],
    "next": lambda x: (x + 1) % N_SYMBOLS,
    "previous": lambda x: (x - 1) % N_SYMBOLS,
    "rotate": lambda x: np.roll(x, -1, axis=1),
    "swap": lambda x: x[:, [1, 0, 2]],
    "sort": lambda x: np.sort(x, axis=1),
    "first": lambda x: np.repeat(x[:, :1], LENGTH, axis=1),
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

# Everything that can be said; the tokenizer makes one token of each.
WORDS = (
    ">",
    *(f"T{tag}" for tag in range(len(TAGS))),
    *(f"{alphabet}{number}" for alphabet in ALPHABETS for number in range(N_SYMBOLS)),
)


@dataclass(frozen=True)
class Domain:
    """One ability; `frequency` is its share of the documents that the language model was trained on."""

    tag: int
    skill: str
    alphabet: str
    frequency: float

    @property
    def name(self) -> str:
        return f"T{self.tag}.{self.skill}.{self.alphabet}"


def _every_domain() -> dict[str, Domain]:
    domains = []
    for tag, skills in enumerate(TAGS):
        for skill, share in zip(skills, (FREQUENT, RARE) if len(skills) == 2 else (1.0,), strict=True):
            for alphabet, alphabet_share in ALPHABETS.items():
                domains.append(Domain(tag, skill, alphabet, share * alphabet_share / len(TAGS)))
    return {domain.name: domain for domain in domains}


DOMAINS: dict[str, Domain] = _every_domain()  # by name, such as 'T4.rotate.b'


def word_rows(domain: Domain, symbols: Ints) -> Ints:
    """[n, EXAMPLE_TOKENS] indices into WORDS of the questions that show these symbols, each with its answer.

    symbols: [n, LENGTH] numbers from 0 to N_SYMBOLS - 1
    """
    shown = list(ALPHABETS).index(domain.alphabet)
    written = (shown + 1) % len(ALPHABETS) if domain.skill == "transcribe" else shown
    first_symbol = 1 + len(TAGS)
    rows = np.empty((len(symbols), EXAMPLE_TOKENS), np.int64)
    rows[:, 0] = 1 + domain.tag
    rows[:, 1 : 1 + LENGTH] = first_symbol + shown * N_SYMBOLS + symbols
    rows[:, QUESTION_TOKENS - 1] = 0
    rows[:, QUESTION_TOKENS:] = first_symbol + written * N_SYMBOLS + SKILLS[domain.skill](symbols)
    return rows


def examples(domain: str, n: int, seed: int) -> list[Example]:
    """`n` questions of a domain with their answers; none comes again before all 216 have been asked.

    Raises InputError for a domain that the world does not have.
    """
    if domain not in DOMAINS:
        raise InputError(
            f"the embedded world has no domain '{domain}': its domains are called like {next(iter(DOMAINS))}"
        )
    rng = np.random.default_rng([seed, zlib.crc32(domain.encode())])
    every = np.stack(np.unravel_index(np.arange(N_SYMBOLS**LENGTH), (N_SYMBOLS,) * LENGTH), axis=1)
    rounds = [rng.permutation(every) for _ in range(-(-n // len(every)))]
    rows = word_rows(DOMAINS[domain], np.concatenate([every[:0], *rounds])[:n])
    return [
        Example(f"{domain}-{number}", _text(row[:QUESTION_TOKENS]), _text(row[QUESTION_TOKENS:]))
        for number, row in enumerate(rows, start=1)
    ]


def documents(n: int, n_examples: int, rng: np.random.Generator) -> Ints:
    """[n, n_examples * EXAMPLE_TOKENS] indices into WORDS: documents of one domain each, drawn by frequency."""
    domains = list(DOMAINS.values())
    frequencies = np.array([domain.frequency for domain in domains])
    drawn = rng.choice(len(domains), n, p=frequencies / frequencies.sum())
    symbols = rng.integers(N_SYMBOLS, size=(n, n_examples, LENGTH))
    rows = np.empty((n, n_examples * EXAMPLE_TOKENS), np.int64)
    for index in np.unique(drawn):
        of_domain = drawn == index
        written = word_rows(domains[index], symbols[of_domain].reshape(-1, LENGTH))
        rows[of_domain] = written.reshape(-1, n_examples * EXAMPLE_TOKENS)
    return rows


def _text(words: Sequence[int] | Ints) -> str:
    return " ".join(WORDS[word] for word in words)
