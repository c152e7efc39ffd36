"""Report section on zeroing features in the running model, from ablation.json."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from sts_fast.ablate.findings import findings, is_loss, main_outcome, short_amount
from sts_fast.files import Document
from sts_fast.report import figures
from sts_fast.report.numbers import with_sign
from sts_fast.statistics import Interval


@dataclass(frozen=True)
class Zeroed:
    """Change of one set's answers with D_N zeroed, with features of similar activity, and with others.

    Better is positive.
    draws:      lowest and highest of `like` over the draws of its features
    difference: top - like
    clear:      true if D_N loses clearly more than `like`
    """

    name: str
    before: float
    top: float
    interval: Interval
    like: float
    draws: Interval
    random: float
    low_shift: float
    difference: float
    difference_interval: Interval
    clear: bool
    accuracy: float
    accuracy_like: float


@dataclass(frozen=True)
class AblationSection:
    sentences: list[str]
    title: str
    top_n: int
    few_shot: bool
    rows: list[Zeroed]
    figure: Markup


def ablation_section(document: Document) -> AblationSection:
    outcome = main_outcome(document)
    # The sign of a loss is reversed: worse is at the left in either case.
    factor = -1.0 if outcome == "loss" else 100.0
    title = "fall of the loss, nats per token" if outcome == "loss" else "change of P(answer), points"
    rows = [_row(entry, outcome, factor) for entry in document["sets"]]
    rows[1:] = sorted(rows[1:], key=lambda row: (row.top, row.name))
    return AblationSection(
        findings(document), title, document["top_n"], document["few_shot"], rows, _figure(rows, title, outcome)
    )


def _row(entry: Document, outcome: str, factor: float) -> Zeroed:
    outcomes = {name: condition[outcome] for name, condition in entry["conditions"].items()}
    accuracy = {name: 100 * condition["accuracy"]["value"] for name, condition in entry["conditions"].items()}
    less = outcomes["like_activity"]["top_less_this"]

    def ends(values: list[float]) -> Interval:
        scaled = [factor * value for value in values]
        return min(scaled), max(scaled)

    return Zeroed(
        name="training set" if entry["kind"] == "train" else entry["name"],
        before=abs(factor) * entry["before"][outcome],
        top=factor * outcomes["top"]["value"],
        interval=ends(outcomes["top"]["ci"]),
        like=factor * outcomes["like_activity"]["value"],
        draws=ends(outcomes["like_activity"]["draws"]),
        random=factor * outcomes["random"]["value"],
        low_shift=factor * outcomes["low_shift"]["value"],
        difference=factor * less["value"],
        difference_interval=ends(less["ci"]),
        clear=is_loss(outcome, less),
        accuracy=accuracy["top"],
        accuracy_like=accuracy["like_activity"],
    )


def _figure(rows: list[Zeroed], title: str, outcome: str) -> Markup:
    scale = figures.Scale.with_intervals(
        [0.0, *(value for row in rows for value in (row.top, row.like))], [row.interval for row in rows], most_ticks=5
    )

    def text(value: float) -> str:
        return with_sign(value) if outcome == "loss" else short_amount(outcome, value / 100)

    dots = [
        figures.Dot(
            row.name,
            row.top,
            row.interval,
            f"{text(row.top)} [{text(row.interval[0])}, {text(row.interval[1])}]",
            row.like,
            "worse" if row.top < 0 else "",
        )
        for row in rows
    ]
    return figures.dots(
        "ablation",
        dots,
        scale,
        axis=("← worse", title, "better →"),
        title=f"With the features of D_N zeroed: {title}, the training set first",
        description=f"Training set: {dots[0].text}. In brackets 95% intervals; the mark on each row is the same with "
        "features of similar activity zeroed. The table below the figure has all numbers.",
    )
