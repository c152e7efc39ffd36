"""Report sections on the scores: the rankings, and the agreement of the estimators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from sts_fast.forecast.blocks import DomainBlock, Scores, SetBlock
from sts_fast.forecast.estimators import BY_NAME, SIZES
from sts_fast.forecast.stability import SHAKY
from sts_fast.report import figures
from sts_fast.report.numbers import (
    MIN_DOMAINS,
    SAME,
    SIMILAR,
    correlation,
    count,
    counted,
    interval,
    isolated,
    joined,
    percent,
    share,
    significant,
)
from sts_fast.statistics import MAX_EXACT, Interval, chance_of_agreement, defined, spearman

# A ranking of more than MOST_ROWS shows FIRST_ROWS at once, and the others after a click.
MOST_ROWS = 30
FIRST_ROWS = 24
MUCH_SKIPPED = 0.5


@dataclass(frozen=True)
class Row:
    """One domain in the ranking.

    clear: true if its interval lies above that of the next; None for the last domain
    """

    name: str
    value: float
    interval: Interval | None
    random: float | None
    n_prompts: int
    clear: bool | None


@dataclass(frozen=True)
class Ranking:
    """All domains by one estimator, the highest score first, with its figure in one part or two.

    random_beyond: the scores of random features that lie beyond the figure's axis, in words
    """

    estimator: str
    label: str
    meaning: str
    rows: list[Row]
    figure: Markup
    more: Markup | None
    n_first: int
    has_random: bool
    random_beyond: str
    sentences: list[str]


@dataclass(frozen=True)
class Agreement:
    """Two estimators over the same domains. rho is None where it cannot be judged."""

    labels: tuple[str, str]
    rho: float | None
    sentence: str


def estimators_of(scores: Scores) -> list[str]:
    """Names of the unsigned estimators with a score for some domain, the main one first."""
    return [name for name in SIZES if any(name in domain["scores"] for domain in scores["domains"])]


def value_of(domain: DomainBlock, estimator: str) -> float | None:
    score = domain["scores"].get(estimator)
    return None if score is None else float(score["value"])


def rankings(scores: Scores) -> list[Ranking]:
    return [_ranking(scores["domains"], estimator) for estimator in estimators_of(scores) if scores["domains"]]


def summary(scores: Scores, ranked: Sequence[Ranking], train: str, model: str) -> Markup:
    """The whole report in one sentence, and its certainty in another."""
    if not ranked:
        shift, top_n = scores["shift"], scores["settings"]["top_n"]
        return Markup(
            "The top {} of {} features make up {} of what <strong>{}</strong> {} in <strong>{}</strong>; no domain was "
            "scored."
        ).format(
            count(top_n), count(scores["sae"]["d_sae"]), percent(shift["share_of_top_n"]), train,
            "activates" if scores["settings"]["dims"] == "active" else "shifts", model,
        )  # fmt: skip
    rows, label = ranked[0].rows, ranked[0].label
    training = "Reinforcement learning of" if scores.get("rollouts") else "Fine-tuning"
    if len(rows) == 1:
        return Markup(
            "{} <strong>{}</strong> on <strong>{}</strong>: the only domain scored, "
            "<strong><bdi>{}</bdi></strong>, has {} = {}. One score alone ranks nothing."
        ).format(training, model, train, rows[0].name, label, significant(rows[0].value))
    return Markup(
        "{} <strong>{}</strong> on <strong>{}</strong> is forecast to move "
        "<strong><bdi>{}</bdi></strong> most and <strong><bdi>{}</bdi></strong> least of {} domains, "
        "for better or worse, by {}. {}"
    ).format(training, model, train, rows[0].name, rows[-1].name, len(rows), label, _how_clear(rows))


def cautions(scores: Scores, ranked: Sequence[Ranking]) -> list[str]:
    """Warnings from the numbers, the gravest first: an SAE that does not fit, many skipped examples, unstable D_N, few
    domains, scores like random features'.
    """
    sentences = [scores["sae"]["fit"]["warning"]] if scores["sae"]["fit"]["warning"] else []
    sets: list[SetBlock] = [scores["train"] | {"name": "the training set"}, *scores["domains"]]
    mostly = [
        read["name"] for read in sets if read["n_skipped"] > MUCH_SKIPPED * (read["n_skipped"] + read["n_prompts"])
    ]
    if mostly:
        sentences.append(
            f"More than half of the examples looked at could not be used in {joined(mostly)}: what is left may not be "
            "like the whole."
        )
    overlap = scores["shift"]["stability"]["mean_overlap"]
    if overlap < SHAKY:
        sentences.append(
            f"The features of D_N are not settled: resampling the training prompts keeps only {percent(overlap)} of "
            "them. More training prompts (--limit) would help."
        )
    n = len(scores["domains"])
    if 0 < n < MIN_DOMAINS:
        sentences.append(
            f"Only {counted(n, 'domain')}: too few to judge a ranking, its controls or the estimators' agreement."
        )
    for ranking in ranked:
        low = [
            row.name
            for row in ranking.rows
            if row.interval and row.random is not None and row.interval[0] <= row.random
        ]
        if low:
            sentences.append(
                f"By {ranking.label}, {joined(low)} {'does' if len(low) == 1 else 'do'} not stand out from random "
                "features: such a score says nothing."
            )
    return sentences


def agreements(scores: Scores) -> list[Agreement]:
    names = estimators_of(scores)
    pairs = []
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            _, x, y = _both(scores["domains"], first, second)
            labels = (BY_NAME[first].label, BY_NAME[second].label)
            rho = defined(spearman(x, y)) if len(x) >= MIN_DOMAINS else None
            pairs.append(Agreement(labels, rho, _agreement_sentence(labels, rho, x, y)))
    return pairs


def agreement_figure(scores: Scores) -> Markup | None:
    """The first two estimators against each other."""
    names = estimators_of(scores)[:2]
    if len(names) < 2:
        return None
    domains, x, y = _both(scores["domains"], *names)
    if len(x) < MIN_DOMAINS:
        return None
    points = [
        figures.Point(d["name"], a, b, _interval(d, names[0]), _interval(d, names[1]))
        for d, a, b in zip(domains, x, y, strict=True)
    ]
    first, second = (BY_NAME[name].label for name in names)
    return figures.scatter(
        "agreement",
        points,
        x_label=f"{first}: {BY_NAME[names[0]].axis} →",
        y_label=f"↑ {second}: {BY_NAME[names[1]].axis}",
        title=f"{second} against {first}, one point per domain",
        description=f"Whiskers are 95% intervals. Spearman correlation {correlation(defined(spearman(x, y)))}. "
        "The numbers are in the tables of the ranking.",
    )


def _interval(domain: DomainBlock, estimator: str) -> Interval:
    low, high = domain["scores"][estimator]["ci"]
    return float(low), float(high)


def _both(
    domains: Sequence[DomainBlock], first: str, second: str
) -> tuple[list[DomainBlock], list[float], list[float]]:
    having = [domain for domain in domains if {first, second} <= domain["scores"].keys()]
    x, y = ([float(domain["scores"][name]["value"]) for domain in having] for name in (first, second))
    return having, x, y


def _ranking(domains: Sequence[DomainBlock], estimator: str) -> Ranking:
    having = [domain for domain in domains if estimator in domain["scores"]]
    having.sort(key=lambda domain: (-domain["scores"][estimator]["value"], domain["name"]))
    rows = []
    for domain, after in zip(having, [*having[1:], None], strict=True):
        bounds, below = _interval(domain, estimator), after and _interval(after, estimator)
        entry = domain["controls"].get("random")
        random = entry.get(estimator) if isinstance(entry, dict) else None
        clear = bounds[0] > below[1] if below else None
        value = float(domain["scores"][estimator]["value"])
        rows.append(Row(domain["name"], value, bounds, random, domain["n_prompts"], clear))
    dots = [
        figures.Dot(f"{i}. {row.name}", row.value, row.interval, _score_text(row), row.random)
        for i, row in enumerate(rows, 1)
    ]
    scale = figures.Scale.of_dots(dots)
    n_first = len(dots) if len(dots) <= MOST_ROWS else FIRST_ROWS
    randoms = [row.random for row in rows if row.random is not None]
    beyond = [random for random in randoms if not scale.contains(random)]
    return Ranking(
        estimator=estimator,
        label=BY_NAME[estimator].label,
        meaning=BY_NAME[estimator].meaning,
        rows=rows,
        figure=_dots(estimator, dots[:n_first], scale),
        more=_dots(estimator, dots[n_first:], scale, start=n_first) if n_first < len(dots) else None,
        n_first=n_first,
        has_random=bool(randoms),
        random_beyond=interval((min(beyond), max(beyond))) if beyond else "",
        sentences=_ranking_sentences(rows),
    )


def _dots(estimator: str, shown: Sequence[figures.Dot], scale: figures.Scale, *, start: int = 0) -> Markup:
    return figures.dots(
        f"ranking-{estimator}-{start}",
        shown,
        scale,
        axis=("", "", f"{BY_NAME[estimator].axis} →"),
        title=f"Domains {start + 1} to {start + len(shown)} by {BY_NAME[estimator].label}, highest first",
        description=f"Highest: {shown[0].name} with {shown[0].text}; lowest: {shown[-1].name} with {shown[-1].text}. "
        "In brackets 95% intervals. The table below the figure has all numbers.",
    )


def _score_text(row: Row) -> str:
    if row.interval is None:
        return significant(row.value)
    return f"{significant(row.value)} [{significant(row.interval[0])}, {significant(row.interval[1])}]"


def _ranking_sentences(rows: Sequence[Row]) -> list[str]:
    sentences = []
    judged = [row for row in rows if row.clear is not None]
    if judged:
        clear = sum(bool(row.clear) for row in judged)
        sentences.append(
            f"Of the {counted(len(judged), 'pair')} of neighbours in this ranking, {clear} "
            f"{'is' if clear == 1 else 'are'} clearly apart: their 95% intervals do not overlap."
        )
    return sentences


def _how_clear(rows: Sequence[Row]) -> str:
    first, second = rows[0], rows[1]
    if first.interval is None or second.interval is None:
        return "Without intervals, the certainty of this order is unknown."
    if first.clear:
        return f"The first place is clear: its 95% interval lies above that of the next, {isolated(second.name)}."
    rivals = [row.name for row in rows[1:] if row.interval and row.interval[1] >= first.interval[0]]
    return f"The first place is not settled: its 95% interval overlaps {joined(rivals, 3)}."


def _agreement_sentence(labels: tuple[str, str], rho: float | None, x: Sequence[float], y: Sequence[float]) -> str:
    pair = f"{labels[0]} and {labels[1]}"
    if len(x) < MIN_DOMAINS:
        return f"Whether {pair} agree cannot be judged: {counted(len(x), 'domain')}, and {MIN_DOMAINS} are needed."
    if rho is None:
        return f"Whether {pair} agree cannot be judged: one of them is the same for all domains."
    if rho >= SAME:
        words = "rank the domains much alike"
    elif rho >= SIMILAR:
        words = "rank the domains broadly alike, with differences"
    elif rho > -SIMILAR:
        words = "do not rank the domains alike: neither ranking should be taken for granted"
    else:
        words = "rank the domains in nearly opposite orders: neither ranking should be taken for granted"
    by_chance = share(chance_of_agreement(rho, x, y))
    return (
        f"{pair} {words} (Spearman {correlation(rho)} over {len(x)} domains; two unrelated rankings come this far from "
        f"zero in {'about ' if len(x) > MAX_EXACT and by_chance[0].isdigit() else ''}{by_chance} of cases)."
    )
