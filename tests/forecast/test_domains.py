"""STS_icl of the same questions, of which others are shown: the intervals must say that it hangs on these.

Thirty questions of five kinds, rotated six ways, so that a file begins with another kind each time. With one draw of
demonstrations the score is another one each time, and each time its interval is narrow.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import sts_fast
from sts_fast.data.examples import Example

ASSETS = Path(__file__).parents[3] / "shared" / "assets"
N_ROTATIONS, LONGEST = 6, 250
pytestmark = pytest.mark.skipif(not ASSETS.is_dir(), reason="the real material is not beside this checkout")


def kinds() -> Iterator[list[tuple[str, str]]]:
    """(question, answer) of each kind."""
    data = ASSETS / "data"

    def lines(text: str, question: str, answer: str) -> list[tuple[str, str]]:
        rows = [json.loads(line) for line in text.splitlines()[:40]]
        return [(row[question], row[answer]) for row in rows]

    yield lines((data / "gsm8k" / "test.jsonl").read_text(), "question", "answer")
    yield lines((data / "math500" / "MATH500.jsonl").read_text(), "Question", "solution")
    code = gzip.decompress((data / "humaneval" / "HumanEval.jsonl.gz").read_bytes()).decode()
    yield lines(code, "prompt", "canonical_solution")
    articles = json.loads((data / "pubmedqa" / "ori_pqal.json").read_text()).values()
    yield [(row["QUESTION"], row["LONG_ANSWER"]) for row in articles]
    yield [(f"Say {word}.", " ".join([word] * 8)) for word in ("yes", "no", "blue", "green", "one", "two")]


def rotated() -> dict[str, list[Example]]:
    of_kinds = zip(*(kind[:6] for kind in kinds()), strict=True)
    asked = [(question[:LONGEST], answer[:LONGEST]) for row in of_kinds for question, answer in row]
    examples = [Example(str(i), question, answer) for i, (question, answer) in enumerate(asked)]
    return {f"from {k}": examples[k:] + examples[:k] for k in range(N_ROTATIONS)}


def icl(architecture: str, n_draws: int) -> tuple[list[float], np.ndarray, float]:
    """(scores, their intervals [6, 2], share of the pairs that are told to be apart)."""
    forecast = sts_fast.score(
        model=ASSETS / "models" / "stories260K",
        sae=ASSETS / "saes" / f"saelens_v6_stories260K_L2_{architecture}",
        train=ASSETS / "data" / "gsm8k" / "train.jsonl",
        domains=rotated(),
        estimators=("icl",),
        shots=1,
        domain_shots=1,
        demo_draws=n_draws,
        limit=30,
        top_n=20,
    )  # fmt: skip
    values, intervals = forecast.column("icl")
    return values, np.asarray(intervals), forecast.settled["ranking"]["icl"]["pairs_apart"]


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_over_five_draws_the_intervals_of_six_rotations_contain_each_other(architecture: str) -> None:
    values, intervals, apart = icl(architecture, 5)
    assert apart == 0
    assert intervals[:, 0].max() < intervals[:, 1].min()
    contained = [low <= value <= high for value in values for low, high in intervals]
    assert sum(contained) >= 0.9 * N_ROTATIONS**2


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_over_one_draw_they_do_not(architecture: str) -> None:
    values, _, apart = icl(architecture, 1)
    assert max(values) > 4 * min(values)
    assert apart > 0.5
