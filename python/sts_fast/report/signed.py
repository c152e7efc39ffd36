"""Report section on the direction in which each domain moves, and the features that carry it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from sts_fast.forecast.blocks import ScoreBlock, Scores
from sts_fast.forecast.estimators import BY_NAME, SIGNED_OPTIONS, signed_fields
from sts_fast.report import figures
from sts_fast.report.features import FIRST_FEATURES, Feature, FeatureSection, feature_of, section_of
from sts_fast.report.numbers import counted, isolated, joined, percent, signed_together, significant, with_sign
from sts_fast.report.ranking import FIRST_ROWS, MOST_ROWS
from sts_fast.report.run import Material
from sts_fast.signed.push import SMALLEST_P, SOLVED_LOSS
from sts_fast.signed.signed import SignedBlock, SignedDomainBlock, TrialBlock
from sts_fast.signed.trial import OWN_ROWS
from sts_fast.statistics import Interval

# The estimator that came closest to real training (docs/signed.md) is first.
MOST_PARTS = 5
MOST_DOMAINS = 3


@dataclass(frozen=True)
class SignedRow:
    """One domain's forecast; better is positive.

    direction: 'better' or 'worse' where the whole interval is, else 'open'
    unlikely:  true if the answers are too long for a change of P to say much
    """

    name: str
    value: float
    interval: Interval
    direction: str
    unlikely: bool
    p_answer: float
    base_loss: float
    n_prompts: int


@dataclass(frozen=True)
class SignedRanking:
    """All domains by one number, the best first.

    field: its name in scores.json, such as 'adapter_loss'
    """

    field: str
    title: str
    unit: str
    rows: list[SignedRow]
    figure: Markup
    more: Markup | None
    n_first: int
    sentences: list[str]


@dataclass(frozen=True)
class Estimated:
    """One estimator: its method in words, its main number, and the other one."""

    name: str
    how: str
    main: SignedRanking
    other: SignedRanking


@dataclass(frozen=True)
class Part:
    """A feature's part in the forecast of a domain.

    is_explained: true if the table of features has a row for it
    """

    index: int
    domain: str
    contribution: float
    label: str | None
    is_explained: bool


@dataclass(frozen=True)
class Carried:
    """The features that carry one domain's forecast: those that push it up, and down, largest parts first."""

    name: str
    n_features: int
    share: float
    better: list[Part]
    worse: list[Part]


@dataclass(frozen=True)
class SignedSection:
    """The signed forecasts of a run.

    summary:   the section in one sentence
    sentences: the training set's loss, and domains with a restriction
    carriers:  the table of features; None without features
    """

    summary: Markup
    sentences: list[str]
    estimators: list[Estimated]
    carriers: FeatureSection | None
    domains: list[Carried]
    carrier_sentences: list[str]


def signed_section(run: Material) -> SignedSection | None:
    """The section; None where the run has no signed forecast."""
    signed, estimators = run.scores.get("signed"), estimated(run.scores)
    if not signed or not estimators:
        return None
    carriers, carried = _carriers(run, signed)
    return SignedSection(
        summary=summary(estimators),
        sentences=_sentences(run.scores, signed),
        estimators=estimators,
        carriers=carriers,
        domains=carried,
        carrier_sentences=_carrier_sentences(signed, carried),
    )


def estimated(scores: Scores) -> list[Estimated]:
    """The estimators with a sign that every domain with answers has, the one to read first before the others."""
    signed = scores.get("signed")
    if not signed or not signed["domains"]:
        return []
    domains = signed["domains"]
    scores_of = {domain["name"]: domain["scores"] for domain in scores["domains"] if domain["name"] in domains}
    # Where most answers are too long, a change of their probability is shown after that of their loss.
    unlikely = sum(entry["p_answer"] < SMALLEST_P for entry in domains.values()) > len(domains) / 2
    estimators = []
    for name in SIGNED_OPTIONS:
        if all(name in of_domain for of_domain in scores_of.values()):
            main, other = (f"{name}_loss", name) if unlikely else signed_fields(name)
            rankings = [_ranking(scores_of, domains, field) for field in (main, other)]
            estimators.append(Estimated(name, BY_NAME[name].meaning, *rankings))
    return estimators


def number_text(field: str, value: float) -> str:
    if BY_NAME[field].unit != "points":
        return with_sign(value)
    return "0.0" if abs(value) < 0.05 else f"{value:+.1f}".replace("-", "−")


def _ranking(
    scores: Mapping[str, dict[str, ScoreBlock]], domains: Mapping[str, SignedDomainBlock], field: str
) -> SignedRanking:
    estimator, rows = BY_NAME[field], []
    for name, entry in domains.items():
        score = scores[name][field]
        low, high = (estimator.factor * bound for bound in score["ci"])
        rows.append(
            SignedRow(
                name=name,
                value=estimator.factor * score["value"],
                interval=(low, high),
                direction="better" if low > 0 else "worse" if high < 0 else "open",
                unlikely=entry["p_answer"] < SMALLEST_P and not field.endswith("_loss"),
                p_answer=entry["p_answer"],
                base_loss=entry["base_loss"],
                n_prompts=entry["n_prompts"],
            )
        )
    rows.sort(key=lambda row: (-row.value, row.name))
    first = rows
    if len(rows) > MOST_ROWS:
        largest = sorted(rows, key=lambda row: -abs(row.value))[:FIRST_ROWS]
        first = [row for row in rows if row in largest]
    more = [row for row in rows if row not in first]
    return SignedRanking(
        field=field,
        title=estimator.title,
        unit=estimator.unit,
        rows=rows,
        figure=_dots(field, first, rows),
        more=_dots(field, more, rows, part="more") if more else None,
        n_first=len(first),
        sentences=_ranking_sentences(rows),
    )


def _dots(field: str, shown: Sequence[SignedRow], rows: Sequence[SignedRow], *, part: str = "first") -> Markup:
    title = BY_NAME[field].title
    scale = figures.Scale.with_intervals(
        [0.0, *(row.value for row in rows)], [row.interval for row in rows], most_ticks=5
    )
    text = signed_together(row.value for row in rows)
    if BY_NAME[field].unit == "points":
        text = functools.partial(number_text, field)
    dots = [
        figures.Dot(
            row.name + (" (answers too long)" if row.unlikely else ""),
            row.value,
            row.interval,
            "{} [{}, {}]".format(*map(text, (row.value, *row.interval))),
            kind=" ".join(["worse"] * (row.value < 0) + ["other"] * (row.direction == "open")),
        )
        for row in shown
    ]
    return figures.dots(
        f"signed-{field}-{part}",
        dots,
        scale,
        axis=("← worse", title, "better →"),
        title=f"Forecast {title}, of {counted(len(shown), 'domain')}, best first",
        description=f"Best: {dots[0].name} with {dots[0].text}; worst: {dots[-1].name} with {dots[-1].text}. In "
        "brackets 95% intervals. Dots to the left of zero mean worse, to the right better.",
    )


def _ranking_sentences(rows: Sequence[SignedRow]) -> list[str]:
    n = {kind: sum(row.direction == kind for row in rows) for kind in ("better", "worse", "open")}
    sentence = (
        f"Of {counted(len(rows), 'domain')}, {n['better'] or 'none'} {'is' if n['better'] == 1 else 'are'} forecast to "
        f"get better and {n['worse'] or 'none'} to get worse with the whole 95% interval"
    )
    return [sentence + (f"; {n['open']} may go either way." if n["open"] else ".")]


def summary(estimators: Sequence[Estimated]) -> Markup:
    """The first estimator in one sentence."""
    first, ranking = estimators[0], estimators[0].main
    best, worst = ranking.rows[0], ranking.rows[-1]
    unit = f" {ranking.unit}" if ranking.unit else ""
    parts = [
        Markup("{} <strong><bdi>{}</bdi></strong> most ({}{}{})").format(
            verb,
            row.name,
            number_text(ranking.field, row.value),
            unit,
            ", with zero inside its interval" if row.direction == "open" else "",
        )
        for row, verb, is_so in ((best, "improve", best.value > 0), (worst, "harm", worst.value < 0))
        if is_so
    ]
    if not parts:
        return Markup("By {} no domain moves.").format(first.name)
    return Markup("Training is forecast to {}, by {}.").format(Markup(" and to ").join(parts), first.name)


def _sentences(scores: Scores, signed: SignedBlock) -> list[str]:
    sentences = []
    if signed["train_loss"] < SOLVED_LOSS:
        sentences.append(
            f"Weak: the model answers the training set already (loss {signed['train_loss']:.2g} nats per token), so "
            "there is little left to learn from it."
        )
    else:
        sentences.append(
            f"Before training the model's loss on {'the first of ' if signed['features'] is None else ''}the training "
            f"set's answers is {significant(signed['train_loss'])} "
            "nats per token."
        )
    left = ", ".join(f"{name} leaves {percent(share)}" for name, share in sorted(signed["loss_left"].items()))
    if left:
        sentences[-1] = sentences[-1].rstrip(".") + f"; of it {left}."
    if (trial := signed["trial"]) is not None:
        sentences.append(
            f"The trial took {counted(trial['n_steps'], 'step')} on {counted(trial['n_rows'], 'example')}; the loss of "
            f"the first {min(trial['n_rows'], OWN_ROWS)} went from {significant(trial['loss_before'])} to "
            f"{significant(trial['loss_after'])} nats per token."
        )
        sentences += _trial_sentences(trial)
    unlikely = [name for name, entry in signed["domains"].items() if entry["p_answer"] < SMALLEST_P]
    if unlikely:
        sentences.append(
            f"The answers of {joined(unlikely)} are too long or too unlikely for a change of their probability to say "
            "much: read the fall of the loss there."
        )
    absent = [domain["name"] for domain in scores["domains"] if domain["name"] not in signed["domains"]]
    if absent:
        sentences.append(f"Too few answers for {joined(absent)}.")
    return sentences


def _carriers(run: Material, signed: SignedBlock) -> tuple[FeatureSection | None, list[Carried]]:
    known = {entry["index"]: entry for entry in signed["top_features"]}
    explained = list(known)[:FIRST_FEATURES]
    parts: dict[int, list[Part]] = {}
    carried = []
    for name, entry in signed["domains"].items():
        of_domain = [
            Part(
                top["index"],
                name,
                top["contribution"],
                known[top["index"]]["label"] if top["index"] in known else None,
                top["index"] in explained,
            )
            for top in entry["top_features"] or []
        ]
        for part in of_domain:
            parts.setdefault(part.index, []).append(part)
        share = entry["share_of_top_features"]
        if of_domain and share is not None:
            better = [part for part in of_domain if part.contribution > 0]
            worse = [part for part in of_domain if part.contribution < 0]
            carried.append(Carried(name, len(of_domain), share, better[:MOST_PARTS], worse[:MOST_PARTS]))
    if not known:
        return None, carried
    features: list[Feature] = []
    for rank, index in enumerate(explained, 1):
        moved = sorted(parts.get(index, []), key=lambda part: -abs(part.contribution))
        feature = feature_of(rank, known[index], run.signed_firings)
        features.append(feature.moving([(part.domain, part.contribution) for part in moved[:MOST_DOMAINS]]))
    return section_of(features, "all parts"), carried


def _trial_sentences(trial: TrialBlock) -> list[str]:
    """Sentences on the number of prompts asked again, and on the weight of each domain's own prompts."""
    asked = [of["n_prompts"] for of in trial["domains"].values()]
    shares = [of["own_share"] for of in trial["domains"].values()]
    count = str(max(asked)) if len(set(asked)) == 1 else f"{min(asked)} to {max(asked)}"
    sentences = [f"Then {count} prompts of each domain were asked again."]
    if min(shares) < 1:
        sentences.append(
            f"Between {percent(min(shares))} and {percent(max(shares))} of a value is what a domain's own prompts say; "
            "the rest is what the base losses of all domains foretell, the more the fewer or the more unlike the "
            "prompts (Fay and Herriot)."
        )
    return sentences


def _carrier_sentences(signed: SignedBlock, carried: Sequence[Carried]) -> list[str]:
    explains = (
        "The SAE shows which features carry a forecast; the accuracy does not come from it: in the residual stream "
        "itself, without any SAE, the same estimators did about as well."
    )
    if signed["features"] is None:
        return ["A trial does not tell which features carry it: add ntk to --estimators."]
    if signed["features"] == "raw":
        return ["This forecast was made in the residual stream itself, so there are no features to show.", explains]
    if not carried:
        return ["No feature carries any part of these forecasts.", explains]
    most, least = max(carried, key=lambda carrier: carrier.share), min(carried, key=lambda carrier: carrier.share)
    sentence = (
        f"The {most.n_features} features with the largest parts carry {percent(most.share)} of the forecast of "
        f"{isolated(most.name)}"
    )
    if most is not least:
        sentence += f" and {percent(least.share)} of that of {isolated(least.name)}"
    return [f"{sentence}, by the sizes of the parts.", explains]
