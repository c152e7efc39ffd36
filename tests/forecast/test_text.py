"""Numbers of texts, counted by hand and by other means."""

from __future__ import annotations

import lzma
import random
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import Tiny

import sts_fast
from sts_fast.forecast import text


def ngrams_of(questions: tuple[str, ...]) -> Counter[str]:
    """Literally: every 3, 4 and 5 characters of each question in lower case, with single spaces."""
    counts: Counter[str] = Counter()
    for question in questions:
        shown = " ".join(question.lower().split())
        for n in (3, 4, 5):
            counts.update(shown[i : i + n] for i in range(len(shown) - n + 1))
    return counts


def similarity_of(one: Counter[str], other: Counter[str]) -> float:
    n, m = sum(one.values()), sum(other.values())
    return float(sum((one[gram] / n * other[gram] / m) ** 0.5 for gram in one))


def raw_deflate(data: bytes) -> int:
    """By another interface: zlib's stream is a header of two bytes, the compressed text, and a checksum of four."""
    return len(zlib.compress(data, 9)) - 6


def test_ngrams_by_hand() -> None:
    # 'abcab' has abc, bca, cab; abca, bcab; abcab. 'ABC' has one, which is abc; 'ab' none, and none spans two texts.
    counts = text.count_ngrams(["abcab", "ABC", "ab"])
    assert sorted(counts[counts > 0].tolist()) == [1, 1, 1, 1, 1, 2]
    assert (text.count_ngrams(["a \n\t b"]) == text.count_ngrams(["a b"])).all()
    assert not text.count_ngrams([]).any()
    assert not text.count_ngrams(["", "ab", "é"]).any()


def test_similarity_by_hand() -> None:
    # Three-character texts have one n-gram each: of {abc, abc, xyz} a third is xyz, and so is all of {xyz}.
    assert text.similarity(("abc", "abc", "xyz"), ("xyz",)) == pytest.approx((1 / 3) ** 0.5, rel=1e-6)
    assert text.similarity(("abc", "xyz"), ("xyz", "abc")) == pytest.approx(1.0, rel=1e-6)
    assert text.similarity(("abc",), ("xyz",)) == 0
    assert text.similarity(("ab",), ("ab",)) == 0  # too short to have any


def test_similarity_is_that_of_literal_ngrams() -> None:
    sets = [
        ("How many apples are 3 + 4 apples?", "What is 12 * 12?"),
        ("Who wrote Faust?", "Which Court may overrule a COURT of appeal?", "Où est l'État?"),
    ]
    grams = [ngrams_of(questions) for questions in sets]
    # None of these n-grams shares its counter with another one.
    assert sum((text.count_ngrams(sum(sets, ())) > 0).tolist()) == len(grams[0] | grams[1])
    assert text.similarity(*sets) == pytest.approx(similarity_of(*grams), rel=1e-6)
    assert 0 < text.similarity(*sets) < 0.5


def test_words_and_digits_by_hand() -> None:
    # Words: What, is, 12, plus, x3?, (4); three of the six have a digit. Then: no, digits, here.
    questions = ("What is 12\nplus  x3? (4)", "no digits here")
    assert text.mean_words(questions) == 4.5
    assert text.digit_share(questions) == pytest.approx(3 / 9)
    assert text.digit_share(("a1b2 3c4 5",)) == 1.0  # a word counts once, wherever its digits are
    assert text.digit_share(("½ is no decimal digit, ٣ is one",)) == pytest.approx(1 / 8)
    assert (text.mean_words(("",)), text.digit_share(("",))) == (0, 0)


def test_saved_bytes_are_those_of_zlib() -> None:
    rng = random.Random(0)
    train = tuple(" ".join(rng.choices(["sum", "of", "12", "apples", "and", "7"], k=30)) for _ in range(20))
    domain = tuple(" ".join(rng.choices(["court", "law", "of", "appeal", "and"], k=30)) for _ in range(20))
    S, T = ("\n".join(questions).encode() for questions in (train, domain))
    expected = (raw_deflate(S) + raw_deflate(T) - raw_deflate(S + T)) / raw_deflate(T)
    assert text.saved_bytes(train, domain) == expected
    assert text.saved_bytes(train, train) > 0.9 > text.saved_bytes(train, domain)
    # Another compressor agrees about which is more alike.
    xz = {name: len(lzma.compress(S + other)) for name, other in (("same", S), ("other", T))}
    assert xz["same"] < xz["other"]


def test_samples_are_bounded_and_take_from_the_whole_set() -> None:
    questions = tuple(f"{i:04d} " + "x" * 1000 for i in range(300))
    taken = text.sample(questions, 2**14)
    assert len(taken) == 60
    assert sum(map(len, taken)) <= 2**14
    assert all(len(one) >= text.LEAST for one in taken)
    assert [int(one[:4]) for one in taken] == list(range(0, 300, 5))
    assert text.sample(questions[:4], 2**14) == list(questions[:4])
    assert text.sample((), 2**14) == []
    assert len(text.profile(tuple("é" * 5000 for _ in range(90))).sample) <= text.MOST_BYTES


def test_numbers_are_the_same_in_another_process() -> None:
    program = (
        "from sts_fast.forecast import text\n"
        "sets = ('What is 2 + 2?', 'Name a court.'), ('Who was 1st?', 'What is law?')\n"
        "print(text.similarity(*sets).hex(), text.saved_bytes(*sets).hex())\n"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(said) == 1
    assert np.isfinite([float.fromhex(number) for number in said.pop().split()]).all()


def test_every_domain_of_a_forecast_has_the_numbers_of_its_questions(tiny: Tiny) -> None:
    options: dict[str, Any] = {"shots": 1, "domain_shots": 2, "top_n": 8, "estimators": ("act",), "dims": "active"}
    forecast = sts_fast.score(
        model=tiny.model, sae=tiny.saes["topk"], train=tiny.train, domains=tiny.domains, **options
    )
    rows = forecast.prompts.to_pylist()

    def questions(path: Path, stage: str, name: str) -> tuple[str, ...]:
        by_id = {example.id: example.question for example in sts_fast.load_examples(path)}
        return tuple(by_id[row["id"]] for row in rows if (row["stage"], row["domain"]) == (stage, name))

    train = questions(tiny.train, "shift", "train")
    for domain in forecast.domains:
        asked = questions(tiny.domains[domain.name], "score", domain.name)
        assert domain.controls["text_length"] == {"words": np.mean([len(one.split()) for one in asked])}
        words = [word for one in asked for word in one.split()]
        with_digit = [word for word in words if any(character in "0123456789" for character in word)]
        assert domain.controls["text_digits"] == {"share": len(with_digit) / len(words)}
        alike = similarity_of(ngrams_of(train), ngrams_of(asked))
        assert domain.controls["text_similarity"]["cosine"] == pytest.approx(alike, abs=0.02)  # of shared counters
        assert domain.controls["text_compression"] == {"saved": text.saved_bytes(train, asked)}
