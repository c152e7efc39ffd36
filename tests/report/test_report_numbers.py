from __future__ import annotations

import pytest

from sts_fast.report import numbers


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" the", "␣the"),
        ("\n\n", "↵↵"),
        ("a\tb\r", "a⇥b␍"),
        ("\u00a0", "⍽"),
        ("", "(empty)"),
        ("\u200b", "U+200B"),
        ("\u200d\u2060", "U+200D U+2060"),
        ("e\u0301", "e\u0301"),
        ("数", "数"),
    ],
)
def test_tokens_are_made_visible(token: str, shown: str) -> None:
    assert numbers.visible_token(token) == shown


def test_signed_numbers_have_the_decimals_of_the_largest() -> None:
    text = numbers.signed_together([0.461, -0.0002])
    assert [text(value) for value in (0.461, -0.0751, 0.0002, -0.0002)] == ["+0.46", "−0.08", "0.00", "0.00"]
    assert numbers.signed_together([123.4], digits=3)(-67.8) == "−68"
    assert numbers.signed_together([])(1.0) == "+1.0"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"), (5.892992, "5.89"), (4.8, "4.80"), (100.0, "100"), (-0.25, "−0.250"), (1234.5, "1,234"),
        (1e-5, "1.00e−05"), (12345678.0, "1.23e+07"), (None, "–"),
    ],
)  # fmt: skip
def test_numbers_have_three_digits(value: float | None, shown: str) -> None:
    assert numbers.significant(value) == shown
