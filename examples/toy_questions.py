"""Writes a few small sets of questions and answers, to try a model on before there is any data.

python examples/toy_questions.py FOLDER
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path


def write_questions(folder: Path, n: int = 60) -> None:
    """Small sets of questions and answers, one JSONL file a domain."""
    rng = random.Random(0)
    words = ["apple", "river", "stone", "cloud", "table", "green", "window", "garden", "silver", "mountain"]
    days = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]

    def addition() -> tuple[str, str]:
        a, b = rng.randrange(100), rng.randrange(100)
        return f"What is {a} + {b}?", str(a + b)

    def multiplication() -> tuple[str, str]:
        a, b = rng.randrange(20), rng.randrange(20)
        return f"What is {a} times {b}?", str(a * b)

    def reversal() -> tuple[str, str]:
        word = rng.choice(words)
        return f"Spell '{word}' backwards.", word[::-1]

    def counting() -> tuple[str, str]:
        word, letter = rng.choice(words), rng.choice("aeinrt")
        return f"How many times does the letter {letter} occur in '{word}'?", str(word.count(letter))

    def calendar() -> tuple[str, str]:
        day, ahead = rng.randrange(7), rng.randrange(1, 10)
        return f"Today is {days[day]}. What day is it in {ahead} days?", days[(day + ahead) % 7]

    makers: list[Callable[[], tuple[str, str]]] = [addition, multiplication, reversal, counting, calendar]
    folder.mkdir(parents=True, exist_ok=True)
    for make in makers:
        rows = [dict(zip(("question", "answer"), make(), strict=True)) for _ in range(n)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{make.__name__}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write_questions(Path(sys.argv[1]))
