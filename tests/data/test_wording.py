"""Questions that ask the same: 13 words in a row, or all of a shorter one."""

from __future__ import annotations

from sts_fast.data.wording import Wording

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen"


def test_thirteen_words_in_a_row_are_the_same_question() -> None:
    wording = Wording.of({"law": [f"Before: {LONG.title()}, and behind?", "What is the law?"], "art": ["what is Art"]})
    assert wording.sets_with(f"quite other words, {LONG}") == {"law"}
    assert wording.sets_with(f"one {LONG[: -len(' thirteen')]} fourteen") == set()
    assert wording.sets_with("WHAT IS THE LAW") == {"law"}
    assert wording.sets_with("So: what is the law?") == set()
    assert wording.sets_with("What  is\nart") == {"art"}
    assert wording.sets_with("...") == set()
    assert wording.shared(["What is art?", "No.", "What is the law?", LONG]) == {"art": [0], "law": [2, 3]}


def test_an_instruction_that_comes_with_every_question_is_none() -> None:
    asked = [f"{LONG}: question number {i} is about {i}" for i in range(20)]
    wording = Wording.of({"law": asked})
    assert wording.shared([f"{LONG}: question number 99 is about something", asked[3]]) == {"law": [1]}
    assert Wording.of({"law": ["Who?", "Who?", "Why?"]}).sets_with("who") == {"law"}
    assert Wording.of({"law": asked[:1]}).shared([LONG]) == {"law": [0]}  # of one question, nothing tells
