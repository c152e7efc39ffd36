"""Formats of numbers, names and tokens in the reports."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence

from markupsafe import Markup

NOT_THERE = "–"
MIN_DOMAINS = 4
# Least Spearman correlations at which two orders are called nearly the same, and similar.
SAME = 0.8
SIMILAR = 0.5
MOST_NAMED = 5
PICTURES = {" ": "␣", "\n": "↵", "\r": "␍", "\t": "⇥", "\u00a0": "⍽", "\u3000": "␣"}


def significant(value: float | None) -> str:
    """Three significant digits, whole numbers from 1,000 on."""
    if value is None:
        return NOT_THERE
    if value == 0:
        return "0"
    if 1000 <= abs(value) < 1e7:
        text = f"{value:,.0f}"
    elif 1e-3 <= abs(value) < 1000:
        text = f"{value:#.3g}".rstrip(".")
    else:
        text = f"{value:.2e}"
    return text.replace("-", "−")


def with_sign(value: float) -> str:
    """As `significant`, with a plus before positive numbers."""
    return f"+{significant(value)}" if value > 0 else significant(value)


def signed_together(values: Iterable[float], digits: int = 2) -> Callable[[float], str]:
    """A format with a plus before positive numbers, with as many decimals as the largest of `values` needs."""
    largest = max(map(abs, values), default=0.0) or 1.0
    decimals = max(0, digits - 1 - math.floor(math.log10(largest)))

    def text(value: float) -> str:
        shown = f"{value:+.{decimals}f}".replace("-", "−")
        return shown if re.search("[1-9]", shown) else shown[1:]

    return text


def interval(bounds: Sequence[float] | None) -> str:
    return NOT_THERE if bounds is None else f"{significant(bounds[0])} to {significant(bounds[1])}"


def correlation(value: float | None) -> str:
    return NOT_THERE if value is None else f"{value:.2f}".replace("-", "−")


def correlations(bounds: Sequence[float] | None) -> str:
    return NOT_THERE if bounds is None else f"{correlation(bounds[0])} to {correlation(bounds[1])}"


def bracketed(bounds: Sequence[float] | None) -> str:
    """' [low, high]' of a correlation, or nothing."""
    return "" if bounds is None else f" [{correlation(bounds[0])}, {correlation(bounds[1])}]"


def chance(value: float | None) -> str:
    if value is None:
        return NOT_THERE
    return f"{value:.2g}" if value >= 0.001 else "below 0.001"


def share(value: float) -> str:
    """A chance in percent."""
    return f"{value:.1%}" if value >= 0.001 else "fewer than 0.1%"


def percent(value: float | None) -> str:
    return NOT_THERE if value is None else f"{value:.1%}"


def count(value: int) -> str:
    return f"{value:,}"


def counted(n: int, noun: str) -> str:
    """'1 domain', '7 domains'."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def isolated(name: str) -> str:
    """A name that keeps its own writing direction inside a sentence."""
    return f"\u2068{name}\u2069"


def plain(sentence: str) -> str:
    """A sentence of a page as text for a terminal: no markup, and no marks around names."""
    return re.sub("[\u2068\u2069]", "", Markup(sentence).striptags() if isinstance(sentence, Markup) else sentence)


def joined(names: Sequence[str], most: int = MOST_NAMED) -> str:
    """'a, b and c', or 'a, b and 5 others'."""
    names = [isolated(name) for name in names]
    if len(names) > most:
        return f"{', '.join(names[: most - 1])} and {len(names) - most + 1} others"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def visible_token(token: str) -> str:
    """A token with its white space shown; one of invisible characters alone as their code points."""
    if not token:
        return "(empty)"
    shown = "".join(PICTURES.get(character, character) for character in token)
    if all(unicodedata.category(character)[0] in "CZ" for character in shown):
        return " ".join(f"U+{ord(character):04X}" for character in shown)
    return shown


def visible_context(text: str) -> str:
    """Running text on one line: line breaks and tabs as signs."""
    return re.sub("\r\n|[\n\r]", " ↵ ", text).replace("\t", " ⇥ ")
