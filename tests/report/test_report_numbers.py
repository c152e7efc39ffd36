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


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"), (5.892992, "5.89"), (4.8, "4.80"), (100.0, "100"), (-0.25, "−0.250"), (1234.5, "1,234"),
        (1e-5, "1.00e−05"), (12345678.0, "1.23e+07"), (None, "–"),
    ],
)  # fmt: skip
def test_numbers_have_three_digits(value: float | None, shown: str) -> None:
    assert numbers.significant(value) == shown
