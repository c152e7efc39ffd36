"""Questions that ask the same: 13 words in a row, or all where there are fewer."""

from __future__ import annotations

from sts_fast.data.contamination import NgramIndex

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen"


def test_thirteen_words_in_a_row_are_the_same_question() -> None:
    ngrams = NgramIndex.of(
        {"law": [f"Before: {LONG.title()}, and behind?", "What is the law?"], "art": ["what is Art"]}
    )
    assert ngrams.sets_with(f"quite other words, {LONG}") == {"law"}
    assert ngrams.sets_with(f"one {LONG[: -len(' thirteen')]} fourteen") == set()
    assert ngrams.sets_with("WHAT IS THE LAW") == {"law"}
    assert ngrams.sets_with("So: what is the law?") == set()
    assert ngrams.sets_with("What  is\nart") == {"art"}
    assert ngrams.sets_with("...") == set()
    assert NgramIndex.of({"sums": ["2 + 3 = ?"]}).sets_with("2 - 3 = ?") == set()
    assert ngrams.shared(["What is art?", "No.", "What is the law?", LONG]) == {"art": [0], "law": [2, 3]}


def test_an_instruction_that_comes_with_every_question_is_none() -> None:
    asked = [f"{LONG}: question number {i} is about {i}" for i in range(20)]
    ngrams = NgramIndex.of({"law": asked})
    assert ngrams.shared([f"{LONG}: question number 99 is about something", asked[3]]) == {"law": [1]}
    assert NgramIndex.of({"law": ["Who?", "Who?", "Why?"]}).sets_with("who") == {"law"}
    assert NgramIndex.of({"law": asked[:1]}).shared([LONG]) == {"law": [0]}  # of one question, nothing tells
