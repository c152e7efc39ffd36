"""Forecast and outcome in the report, from validation.json; keys that are missing are left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from sts_fast.files import Document
from sts_fast.forecast.estimators import BY_NAME, SIGNED, label_of
from sts_fast.outcomes.outcomes import Outcome
from sts_fast.outcomes.validate.statistics import GOOD
from sts_fast.report import figures
from sts_fast.report.controls import control_label
from sts_fast.report.numbers import bracketed, correlation, correlations, percent, share
from sts_fast.statistics import Z_95, Interval


@dataclass(frozen=True)
class Measured:
    """One domain: its score and what really changed."""

    name: str
    score: float
    score_ci: Interval | None
    change: float
    before: float | None
    after: float | None
    stderr: float | None
    z: float | None
    n: int | None
    metric: str

    @property
    def interval(self) -> Interval | None:
        """change -+ 1.96 standard errors."""
        return None if self.stderr is None else (self.change - Z_95 * self.stderr, self.change + Z_95 * self.stderr)

    @property
    def size_interval(self) -> Interval | None:
        """|change| -+ 1.96 standard errors, not below zero."""
        if self.stderr is None:
            return None
        return max(0.0, abs(self.change) - Z_95 * self.stderr), abs(self.change) + Z_95 * self.stderr


@dataclass(frozen=True)
class Correlated:
    """One predictor of |change|: r and what surrounds it."""

    name: str
    value: float
    ci: Interval | None
    ci_domains: Interval | None
    p_one_sided: float | None


@dataclass(frozen=True)
class OutcomeSection:
    label: str
    is_signed: bool
    verdict: str
    rows: list[Measured]
    estimates: list[Correlated]
    scatter: Markup | None
    dots: Markup | None
    has_ceiling: bool
    has_critical: bool
    facts: list[str]


def outcome_section(validation: Document) -> OutcomeSection:
    estimator = _text(validation, "estimator") or "act"
    label, rows = label_of(estimator), measured(validation)
    predictors = [_correlated(label, _get(validation, "size", "pearson"))]
    entries = _get(validation, "controls")
    for name, entry in entries.items() if isinstance(entries, dict) else []:
        predictors.append(_correlated(control_label(name), _get(entry, "pearson")))
    kinds = [
        ("Pearson r", "size", "pearson"),
        ("Spearman", "size", "spearman"),
        ("R²", "size", "r_squared"),
        ("Pearson r with the signed change", "signed", "pearson"),
        ("Spearman with the signed change", "signed", "spearman"),
    ]
    of_score = [_correlated(f"{label}: {words}", _get(validation, *keys)) for words, *keys in kinds]
    of_score += _given_text(label, validation)
    ceiling, critical = _number(validation, "limits", "ceiling"), _number(validation, "limits", "critical_r")
    return OutcomeSection(
        label=label,
        is_signed=estimator in SIGNED,
        verdict=_text(validation, "verdict"),
        rows=rows,
        estimates=[row for row in [*of_score, *predictors[1:]] if row is not None],
        scatter=scatter("outcome", estimator, rows),
        dots=_dots([row for row in predictors if row is not None], ceiling, critical),
        has_ceiling=ceiling is not None,
        has_critical=critical is not None,
        facts=_facts(validation, len(rows)),
    )


def _given_text(label: str, validation: Document) -> list[Correlated | None]:
    """Partial correlations of the score, given the best of the controls that need no model."""
    given = control_label(_text(_get(validation, "size_given_text"), "control"))
    signed = control_label(_text(_get(validation, "signed_given_text"), "control"))
    kinds = [
        (f"partial Pearson r, given {given}", "size_given_text", "pearson"),
        (f"partial Spearman, given {given}", "size_given_text", "spearman"),
        (f"partial Pearson r with the signed change, given {signed}", "signed_given_text", "pearson"),
    ]
    return [_correlated(f"{label}: {words}", _get(validation, *keys)) for words, *keys in kinds]


def outcome_warnings(validation: Document) -> list[str]:
    return [f"Outcomes: {text}" for text in _list(validation, "warnings") if isinstance(text, str)]


def _facts(validation: Document, n: int) -> list[str]:
    """Sentences on what these outcomes could show of any forecast, and on how the numbers were made."""
    sentences = []
    limits = _get(validation, "limits")
    different = _number(limits, "n_distinguishable")
    if different is not None:
        sentences.append(f"{different:.0f} of {n} changes differ from zero at the 5% level.")
    reliability = _number(limits, "reliability")
    if reliability is not None:
        sentences.append(
            f"Reliability of the sizes of change: {correlation(reliability)} of their spread over domains is not noise "
            "of the evaluation."
        )
    ceiling = _number(limits, "ceiling")
    if ceiling is not None:
        bounds = _interval(limits, "ceiling_ci")
        shown = f" (95%: {correlations(bounds)})" if bounds else ""
        sentences.append(
            f"Ceiling: a forecast that knows every change exactly would reach r = {correlation(ceiling)}{shown}."
        )
    good, ranking = _number(limits, "chance_above_good"), _number(limits, "chance_ranking_above_good")
    if good is not None:
        also = "" if ranking is None else f", a random ranking in {share(ranking)}"
        sentences.append(f"Chance: a random forecast exceeds r = {GOOD:g} in {share(good)} of cases{also}.")
    critical = _number(limits, "critical_r")
    if critical is not None:
        sentences.append(f"5% of random forecasts exceed r = {correlation(critical)}.")
    power = _number(limits, "power")
    if power is not None:
        sentences.append(
            f"A forecast whose true r is {GOOD:g} would stand out from random ones in {percent(power)} of cases."
        )
    low_high = _interval(_get(validation, "size", "pearson"), "leave_one_out")
    if low_high is not None:
        sentences.append(
            f"With any one domain left out, r lies between {correlation(low_high[0])} and {correlation(low_high[1])}."
        )
    given = _get(validation, "size_given_text")
    r = _number(given, "r")
    if r is not None:
        sentences.append(
            f"Partial correlations are given {control_label(_text(given, 'control'))}: of the controls that need no "
            f"model, the one with the largest |r| with the size of change, {correlation(r)}."
        )
    carries = _text(validation, "ci_carries")
    if carries:
        sentences.append(
            f"“Measured again”: 95% interval that carries the noise of {carries}, the domains staying the same. “Other "
            "domains”: 95% interval over domains drawn again."
        )
    return sentences


def scatter(name: str, estimator: str, rows: Sequence[Measured], *, small: str = "") -> Markup | None:
    """Measured change against forecast, one point per domain; None for fewer than two.

    A forecast with a sign stands against the change, one without against its size.
    small: the title of one of several figures, which are smaller and have no names of domains
    """
    if len(rows) < 2:
        return None
    of = BY_NAME.get(estimator)
    is_signed, label = of is not None and of.signed, label_of(estimator)
    unit = (of.unit or "no scale") if is_signed and of else of.axis if of else ""
    factor = of.factor if of else 1.0
    points = [
        figures.Point(
            row.name,
            factor * row.score,
            row.change if is_signed else abs(row.change),
            row.score_ci and (factor * row.score_ci[0], factor * row.score_ci[1]),
            row.interval if is_signed else row.size_interval,
            falling=row.change < 0,
        )
        for row in rows
    ]
    metrics = {row.metric for row in rows}
    change = f"change of {rows[0].metric}" if len(metrics) == 1 and not metrics & {"", Outcome.metric} else "change"
    return figures.scatter(
        name,
        points,
        x_label=f"{label}, {unit} →"
        if small and is_signed
        else f"{unit} →"
        if small
        else f"forecast, {label}: {unit} →"
        if unit
        else f"forecast, {label} →",
        y_label=f"↑ {change}" if is_signed else f"↑ |{change}|",
        title=small or f"Measured change against {label}, one point per domain",
        description="Whiskers are 95% intervals. Filled points rose, hollow points fell. "
        "The table below the figure has all numbers.",
        height=figures.SMALL_HEIGHT if small else figures.HEIGHT,
        labelled=not small,
    )


def _dots(predictors: Sequence[Correlated], ceiling: float | None, critical: float | None) -> Markup | None:
    if not predictors:
        return None
    rows = [
        figures.Dot(row.name, row.value, row.ci, f"{correlation(row.value)}{bracketed(row.ci)}", kind="other" * (i > 0))
        for i, row in enumerate(predictors)
    ]
    marks = [(kind, value) for kind, value in (("ceiling", ceiling), ("critical", critical)) if value is not None]
    return figures.dots(
        "predictors",
        rows,
        figures.Scale(-1, 1, (-1, -0.5, 0, 0.5, 1)),
        marks,
        axis=("", "", "Pearson r with |change| →"),
        title="Correlation with the size of change: the score, and each control in its place",
        description="; ".join(f"{row.name}: r = {correlation(row.value)}" for row in predictors)
        + ". Whiskers are 95% intervals if the same domains were measured again.",
    )


def measured(validation: Document) -> list[Measured]:
    """The domains with a score and a change, the highest score first."""
    rows = [row for entry in _list(validation, "domains") if (row := _measured(entry)) is not None]
    return sorted(rows, key=lambda row: (-row.score, row.name))


def measured_r(validation: Document) -> float | None:
    """r of the forecast with the change, or, where it has no sign, with its size."""
    return _number(validation, "signed" if _text(validation, "estimator") in SIGNED else "size", "pearson", "value")


def _measured(entry: Any) -> Measured | None:
    name, score, change = _text(entry, "name"), _number(entry, "score"), _number(entry, "outcome", "change")
    if not name or score is None or change is None:
        return None
    n = _number(entry, "outcome", "n")
    return Measured(
        name=name,
        score=score,
        score_ci=_interval(entry, "score_ci"),
        change=change,
        before=_number(entry, "outcome", "before"),
        after=_number(entry, "outcome", "after"),
        stderr=_number(entry, "outcome", "stderr"),
        z=_number(entry, "z"),
        n=None if n is None else int(n),
        metric=_text(_get(entry, "outcome"), "metric"),
    )


def _correlated(name: str, estimate: Any) -> Correlated | None:
    value = _number(estimate, "value")
    if value is None:
        return None
    return Correlated(
        name, value, _interval(estimate, "ci"), _interval(estimate, "ci_domains"), _number(estimate, "p_one_sided")
    )


def _get(document: Any, *keys: str) -> Any:
    for key in keys:
        document = document.get(key) if isinstance(document, dict) else None
    return document


def _number(document: Any, *keys: str) -> float | None:
    value = _get(document, *keys)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _interval(document: Any, key: str) -> Interval | None:
    value = _get(document, key)
    if not isinstance(value, list) or len(value) != 2:
        return None
    low, high = _number({"": value[0]}, ""), _number({"": value[1]}, "")
    return None if low is None or high is None else (min(low, high), max(low, high))


def _text(document: Any, key: str) -> str:
    value = _get(document, key)
    return value if isinstance(value, str) else ""


def _list(document: Any, key: str) -> list[Any]:
    value = _get(document, key)
    return value if isinstance(value, list) else []
