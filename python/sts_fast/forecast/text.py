"""Properties of questions as text, and the likeness of two sets: without a model, a tokenizer or an SAE."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from sts_fast.statistics import Floats

# Lengths of the character n-grams, and the counters that they are hashed to.
SHORTEST, LONGEST = 3, 5
N_COUNTERS = 2**17
# Characters of a set that its n-grams are counted in, and bytes of it that are compressed: two such texts fit into
# zlib's window of 32 KiB. Of a question at least LEAST characters are taken, of fewer questions more.
MOST_CHARACTERS, MOST_BYTES = 2**16, 2**14
LEAST = 256
# Sets whose profiles are kept for the next training set; each takes half a megabyte.
N_KEPT = 128

_FACTOR, _MIX = np.uint64(0x5851F42D4C957F2D), np.uint64(0x9E3779B97F4A7C15)
_SHIFT = np.uint64(64 - (N_COUNTERS.bit_length() - 1))
_WORD_FROM_DIGIT = re.compile(r"\d\S*")


@dataclass(frozen=True)
class TextProfile:
    """Properties of a set of questions that are compared.

    ngrams:       [N_COUNTERS] float32 root of the share of each n-gram, so that the squares add up to 1; zeros for none
    sample:       at most MOST_BYTES of its text; n_compressed: bytes that this takes compressed
    mean_words:   words of a question, on average
    digit_share:  share of all words that contain a digit
    """

    ngrams: Floats
    sample: bytes
    n_compressed: int
    mean_words: float
    digit_share: float


def similarity(train: tuple[str, ...], domain: tuple[str, ...]) -> float:
    """Cosine of two sets' profiles of character n-grams, from 0 to 1; a count weighs by its root.

    sum_g sqrt(p_g q_g), with p and q the shares of the n-grams g of 3 to 5 characters, in lower case and within
    questions: the Bhattacharyya coefficient of both distributions
    """
    return float(np.sum(profile(train).ngrams * profile(domain).ngrams, dtype=np.float64))


def saved_bytes(train: tuple[str, ...], domain: tuple[str, ...]) -> float:
    """Share of a domain's compressed text that is saved where the training set's comes before it.

    (C(S) + C(T) - C(S T)) / C(T), with C the bytes that zlib compresses a text to, without header: one minus a
    normalised compression distance. Other builds of zlib may compress otherwise.
    """
    train_profile, domain_profile = profile(train), profile(domain)
    together = n_compressed(train_profile.sample + domain_profile.sample)
    return (train_profile.n_compressed + domain_profile.n_compressed - together) / domain_profile.n_compressed


def mean_words(questions: tuple[str, ...]) -> float:
    """Words of a question, on average; words are what white space separates."""
    return profile(questions).mean_words


def digit_share(questions: tuple[str, ...]) -> float:
    """Share of the words of all questions that contain a digit."""
    return profile(questions).digit_share


@lru_cache(maxsize=N_KEPT)
def profile(questions: tuple[str, ...]) -> TextProfile:
    """The profile of a set of questions."""
    n_words = sum(len(question.split()) for question in questions)
    n_digits = sum(len(_WORD_FROM_DIGIT.findall(question)) for question in questions)
    roots = np.sqrt(count_ngrams(sample(questions, MOST_CHARACTERS)))
    text = "\n".join(sample(questions, MOST_BYTES)).encode(errors="replace")[:MOST_BYTES]
    return TextProfile(
        ngrams=(roots / max(float(np.sqrt(np.sum(roots * roots))), 1.0)).astype(np.float32),
        sample=text,
        n_compressed=n_compressed(text),
        mean_words=n_words / max(len(questions), 1),
        digit_share=n_digits / max(n_words, 1),
    )


def sample(questions: Sequence[str], n_characters: int) -> list[str]:
    """The beginnings of questions at equal distances through the set, together at most `n_characters` long."""
    every = -(-len(questions) * LEAST // n_characters)
    chosen = questions[:: max(every, 1)]
    return [question[: n_characters // len(chosen)] for question in chosen]


def count_ngrams(texts: Sequence[str]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """[N_COUNTERS] how often the character n-grams of each counter are found within the texts.

    In lower case, with one space for any white space. The hash is a fixed one, so that counts are the same everywhere.
    """
    joined = "\n".join(" ".join(text.lower().split()) for text in texts)
    characters = np.frombuffer(joined.encode("utf-32-le", errors="replace"), "<u4").astype(np.uint64)
    in_text = characters != ord("\n")
    hashes, within = characters, in_text
    counts = np.zeros(N_COUNTERS, np.int64)
    for n in range(2, LONGEST + 1):
        hashes = hashes[:-1] * _FACTOR + characters[n - 1 :]
        within = within[:-1] & in_text[n - 1 :]
        if n >= SHORTEST:
            counters = (hashes[within] * _MIX) >> _SHIFT
            counts += np.bincount(counters.astype(np.int64), minlength=N_COUNTERS)
    return counts


def n_compressed(text: bytes) -> int:
    """Bytes that zlib compresses a text to, without header and checksum."""
    stream = zlib.compressobj(level=9, wbits=-zlib.MAX_WBITS)
    return len(stream.compress(text)) + len(stream.flush())
