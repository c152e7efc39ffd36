"""Report section on what was asked: a few prompts of each set, the tokens that were read, and their part of a score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from sts_fast.forecast.blocks import Scores
from sts_fast.forecast.estimators import BY_NAME, Estimator
from sts_fast.report.ranking import estimators_of, value_of
from sts_fast.report.run import Sent

# Sets whose prompts are shown, and characters of each prompt.
MOST_SETS = 25
MOST_CHARACTERS = 500


@dataclass(frozen=True)
class Piece:
    """A run of text: 'read', 'unread', or 'peak' for a token on which a feature of a prompt is most active."""

    kind: str
    text: str


@dataclass(frozen=True)
class Part:
    """A feature's share of what a prompt adds to the score, and the token on which it is most active."""

    feature: int
    share: float
    token: str


@dataclass(frozen=True)
class Asked:
    """One prompt.

    score: what its domain would have with this prompt alone, and share: its part of the domain's sum; None for training
    """

    id: str
    pieces: list[Piece]
    n_read: int
    score: float | None
    share: float | None
    parts: list[Part]


@dataclass(frozen=True)
class AskedSet:
    name: str
    n_prompts: int
    prompts: list[Asked]


@dataclass(frozen=True)
class PromptSection:
    """label: of the estimator whose score the prompts add to; n_more: sets that are not shown."""

    label: str
    sets: list[AskedSet]
    n_more: int


def prompt_section(scores: Scores, sent: Mapping[str, Sequence[Sent]]) -> PromptSection | None:
    """The section; None where the run says nothing of its prompts. sent: as in Material."""
    estimators = estimators_of(scores)
    of = BY_NAME[estimators[0] if estimators else "act"]
    per = scores["settings"]["top_n"] if of.per_feature else 1
    domains = sorted(scores["domains"], key=lambda domain: -(value_of(domain, of.name) or 0.0))
    counts = {"": scores["train"]["n_prompts"]}
    counts |= {domain["name"]: domain["n_prompts"] for domain in domains}
    sets = []
    for name, n_prompts in counts.items():
        asked = [_asked(prompt, sent[name], of, per) for prompt in sent.get(name, ()) if prompt.is_shown]
        asked.sort(key=lambda prompt: -(prompt.score or 0.0))
        if asked:
            sets.append(AskedSet(name or "the training set", n_prompts, asked))
    return PromptSection(of.label, sets[:MOST_SETS], len(sets[MOST_SETS:])) if sets else None


def _asked(prompt: Sent, of_set: Sequence[Sent], estimator: Estimator, per: int) -> Asked:
    value = prompt.sums.get(estimator.name)
    total = sum(other.sums.get(estimator.name) or 0.0 for other in of_set)
    n_terms = len(prompt.paired if estimator.of == "pairs" else prompt.positions)
    texts = dict(enumerate(prompt.texts or ()))
    return Asked(
        id=prompt.id,
        pieces=_pieces(prompt),
        n_read=len(prompt.positions),
        score=None if value is None or not n_terms else value / n_terms / per,
        share=None if value is None or total <= 0 else value / total,
        parts=[
            Part(feature, of_feature / value, texts.get(position, "") if position is not None else "")
            for feature, of_feature, position in prompt.parts
            if value
        ],
    )


def _pieces(prompt: Sent) -> list[Piece]:
    """The prompt's text in order, with an ellipsis where it goes on; the question alone where tokens have no text."""
    if not prompt.texts:
        return _shortened([Piece("read", prompt.question or "")])
    read, peaks = set(prompt.positions), {position for _, _, position in prompt.parts}
    told = [i for i, text in enumerate(prompt.texts) if text]
    first, last = (told[0], told[-1]) if told else (0, -1)
    kinds = [
        ("peak" if i in peaks else "read" if i in read else "unread", i, prompt.texts[i])
        for i in range(first, last + 1)
    ]
    # A token with a peak stands alone, others with their neighbours.
    joined = [
        Piece(kind, "".join(text for _, _, text in of_kind))
        for (kind, _), of_kind in groupby(kinds, key=lambda entry: (entry[0], entry[1] if entry[0] == "peak" else -1))
    ]
    pieces = _shortened([piece for piece in joined if piece.text])
    if first > 0:
        pieces.insert(0, Piece("unread", "…"))
    if last + 1 < len(prompt.texts) and pieces[-1].text != "…":
        pieces.append(Piece("unread", "…"))
    return pieces


def _shortened(pieces: Sequence[Piece]) -> list[Piece]:
    kept: list[Piece] = []
    left = MOST_CHARACTERS
    for piece in pieces:
        kept.append(Piece(piece.kind, piece.text[:left]))
        if len(piece.text) > left:
            return [*kept, Piece("unread", "…")]
        left -= len(piece.text)
    return kept
