"""A comparison of forecast and outcome, and its text."""

from __future__ import annotations

import itertools
import json
import math
import textwrap
from dataclasses import asdict, dataclass, field
from pathlib import Path

from sts_fast.errors import InputError
from sts_fast.files import Document
from sts_fast.forecast.controls import label_of as control_label
from sts_fast.forecast.estimators import SIGNED, label_of
from sts_fast.forecast.run import SCORES_FILE, VALIDATION_FILE, belongs, save_beside
from sts_fast.outcomes.evaluation import whole_number
from sts_fast.outcomes.outcomes import Outcome, Outcomes
from sts_fast.outcomes.validate.reading import finite
from sts_fast.outcomes.validate.record import Association, DomainResult, GivenText, Limits, Partial
from sts_fast.outcomes.validate.statistics import GOOD, LEVEL, N_DRAWS, critical_r
from sts_fast.statistics import Interval

ENOUGH_POWER = 0.8
# Characters of a line of text.
LINE = 79


@dataclass(frozen=True)
class Validation:
    """A forecast beside the measured changes.

    size:     scores against |change|, which they forecast; for signed forecasts their absolute values
    signed:   scores against the change with its sign
    sign_auc: of all pairs of a domain that rose and one that fell, the share that a signed forecast puts in the right
              order; None for scores without a sign, or where all changes have one sign
    controls: as `size`, for each control instead of the score
    size_given_text, signed_given_text: the same as `size` and `signed`, given the best of the controls that need no
              model; None where the run has none
    ci_carries: sources of the noise in the intervals `ci`
    mismatches: of the warnings, what differs between the evaluations, or from the model of the forecast
    """

    estimator: str
    domains: list[DomainResult]
    size: Association
    signed: Association
    controls: dict[str, Association]
    limits: Limits
    ci_carries: str
    exact_permutation: bool
    seed: int
    verdict: str
    warnings: list[str]
    sign_auc: float | None = None
    size_given_text: GivenText | None = None
    signed_given_text: GivenText | None = None
    mismatches: list[str] = field(default_factory=list)

    def to_dict(self) -> Document:
        """Plain values, ready for JSON."""
        document: Document = json.loads(json.dumps(asdict(self), allow_nan=False))
        return document

    def to_text(self) -> str:
        """The whole comparison as lines of text, the verdict first."""
        return text_of(self)

    def save(self, folder: str | Path) -> None:
        """Writes validation.json into a run's folder. Raises InputError where it cannot be written."""
        save_beside(Path(folder), VALIDATION_FILE, self.to_dict())


def load_outcomes(folder: str | Path) -> Outcomes:
    """Outcome by domain, and mismatches, as `Validation.save` wrote them into a run's folder.

    Raises InputError where validation.json is missing, damaged or that of another run, or a change is no number.
    """
    path = Path(folder) / VALIDATION_FILE
    try:
        document = json.loads(path.read_text(encoding="utf-8"), parse_int=whole_number)
        mismatches = [str(mismatch) for mismatch in document.get("mismatches", ())]
        outcomes = {
            str(domain["name"]): Outcome(**domain["outcome"] | {"metric": str(domain["outcome"]["metric"])})
            for domain in document["domains"]
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is not a result of sts-fast validate: validate the run again") from error
    if not belongs(Path(folder), document):
        raise InputError(f"{path} belongs to another run than {SCORES_FILE} beside it: validate the run again")
    for name, outcome in outcomes.items():
        finite(f"the change of '{name}' in {path}", outcome.change)
    return Outcomes(outcomes, mismatches=mismatches)


def text_of(validation: Validation) -> str:
    """The whole comparison as lines of text, the verdict first."""
    parts = (
        textwrap.wrap(validation.verdict, LINE),
        domain_lines(validation),
        association_lines(validation),
        limit_lines(validation),
    )
    return "\n\n".join("\n".join(part) for part in parts)


def verdict(
    rows: list[DomainResult], size: Association, controls: dict[str, Association], given: GivenText | None,
    limits: Limits, without: tuple[int, float],
) -> str:  # fmt: skip
    n, r, p = len(rows), size.pearson.value, size.pearson.p_one_sided
    evidence = f"r = {r:.2f}, p = {p:.2g}; Spearman {size.spearman.value:.2f}, p = {size.spearman.p_one_sided:.2g}"
    weak = f"a forecast with a true r of {GOOD:g} would stand out from random ones in only {limits.power:.0%} of cases"
    why = [f"{n} domains are few"] if n < 20 else []
    if limits.n_distinguishable is not None and limits.n_distinguishable < n:
        why.insert(0, f"{n - limits.n_distinguishable} of {n} changes cannot be told from zero")
    because = f" ({', '.join(why)})" if why else ""
    if p < LEVEL:
        sentences = [f"The score orders the {n} domains by size of change better than chance ({evidence})."]
        index, rest = without
        if rest <= critical_r(n - 1):
            sentences.append(f"This depends on {rows[index].name}: without it r is {rest:.2f}, no better than chance.")
        if limits.power < ENOUGH_POWER:
            sentences.append(f"The outcomes are still weak evidence{because}: {weak}.")
    elif limits.power < ENOUGH_POWER:
        sentences = [
            f"These outcomes cannot tell a good forecast from a useless one{because}: {weak}. "
            f"The result of this score ({evidence}) speaks neither for nor against it."
        ]
    else:
        sentences = [
            f"The score is no better than chance ({evidence}), while a forecast with a true r of {GOOD:g} would have "
            f"stood out from random ones in {limits.power:.0%} of cases."
        ]
    rivals = [
        f"{control_label(name)} ({control.pearson.value:.2f})"
        for name, control in controls.items()
        if control.pearson.value >= r
    ]
    if rivals:
        sentences.append(f"Controls do as well: {', '.join(rivals)}.")
    if given is not None:
        sentences.append(_beside_text(given, r, better=p < LEVEL))
    elif controls:
        sentences.append("The run has no control made from the text of the questions alone: score it again to compare.")
    if limits.reliability is None:
        sentences.append("The noise of the evaluation is not known, so this is a best case.")
    return " ".join(sentences)


def _beside_text(given: GivenText, r: float, *, better: bool) -> str:
    """A sentence with the best of the controls that need no model; it says where the text explains the score."""
    best = f"{control_label(given.control)}, the best of the controls that need no model (largest |r| with |change|)"
    partial = given.pearson
    rest = "" if partial is None else f"; given it, the score's partial r is {_with_interval(partial)}"
    if abs(given.r) >= abs(r):
        return f"The text of the questions alone explains as much: {best}, has r = {given.r:.2f}{rest}."
    interval = None if partial is None else partial.ci_domains
    if better and (interval is None or interval[0] <= 0 <= interval[1]):
        return (
            f"The text of the questions may explain it: {best}, has r = {given.r:.2f}{rest}, not clearly different "
            "from 0."
        )
    return f"Text alone explains less: {best}, has r = {given.r:.2f}{rest}."


def _with_interval(partial: Partial) -> str:
    return f"{partial.value:.2f} {_shown(partial.ci_domains)}".strip()


def domain_lines(validation: Validation) -> list[str]:
    label = label_of(validation.estimator)
    title = f"Forecast {label} beside the measured change, {len(validation.domains)} domains"
    lines = [title, "", f"{'domain':<24}{'score [95%]':>25}{'change':>10}{'± stderr':>10}{'z':>7}"]
    for row in sorted(validation.domains, key=lambda row: -row.score):
        interval = "" if row.score_ci is None else f" [{row.score_ci[0]:.3g}, {row.score_ci[1]:.3g}]"
        stderr = "" if row.outcome.stderr is None else f"{row.outcome.stderr:.4f}"
        z = "" if row.z is None else f"{row.z:.1f}"
        score = f"{row.score:.3g}{interval}"
        lines.append(f"{row.name[:23]:<24}{score:>25}{row.outcome.change:>+10.4f}{stderr:>10}{z:>7}")
    return lines


def association_lines(validation: Validation) -> list[str]:
    size, signed = validation.size, validation.signed
    rows = [("Pearson r", size.pearson), ("Spearman r", size.spearman), ("R squared", size.r_squared)]
    given = validation.size_given_text
    partials = (
        [] if given is None else [("Pearson r given text", given.pearson), ("Spearman given text", given.spearman)]
    )
    rows += [(f"r of {control_label(name)}", control.pearson) for name, control in validation.controls.items()]
    rows += [("Pearson r, signed", signed.pearson), ("Spearman r, signed", signed.spearman)]
    columns = f"{'':>6}{'measured again':>16}{'other domains':>16}{'p 1-sided':>10}{'2-sided':>8}"
    lines = [f"{'score, |change|':<22}{columns}"]
    for label, estimate in rows:
        lines.append(
            f"{label[:21]:<22}{estimate.value:>6.2f}{_shown(estimate.ci):>16}{_shown(estimate.ci_domains):>16}"
            f"{estimate.p_one_sided:>10.3f}{estimate.p_two_sided:>8.3f}"
        )
    lines += [
        f"{label:<22}{partial.value:>6.2f}{_shown(partial.ci):>16}{_shown(partial.ci_domains):>16}"
        for label, partial in partials
        if partial is not None
    ]
    orders = "all" if validation.exact_permutation else f"{N_DRAWS:,} random"
    low, high = size.pearson.leave_one_out
    direction = "The score forecasts size, not direction: see r of the signed change."
    if validation.estimator in SIGNED:
        auc = "not known" if validation.sign_auc is None else f"{validation.sign_auc:.0%}"
        direction = (
            "This forecast has a sign. Of all pairs of a domain that rose and one that fell, the share in the right "
            f"order (50% by chance): {auc}."
        )
    if given is not None:
        direction += (
            f" Given text: the partial correlation given {control_label(given.control)}, the control with the largest "
            f"|r| ({given.r:.2f}) of those that need no model."
        )
    note = (
        f"95% intervals: if measured again (noise of {validation.ci_carries}), and over other domains (resampled). "
        f"p: share of {orders} orders of the scores that do as well. Without one of the domains, Pearson r is between "
        f"{low:.2f} and {high:.2f}. {direction}"
    )
    return [*lines, *textwrap.wrap(note, LINE)]


def _shown(interval: Interval | None) -> str:
    return "" if interval is None else f"[{interval[0]:.2f}, {interval[1]:.2f}]"


def limit_lines(validation: Validation) -> list[str]:
    limits, n = validation.limits, len(validation.domains)
    sentences = []
    if limits.n_distinguishable is not None:
        sentences.append(f"{limits.n_distinguishable} of {n} changes differ from zero at 5%")
    if limits.reliability is not None:
        sentences.append(
            f"reliability of |change|: {limits.reliability:.2f}; a forecast that knows every true |change| reaches its "
            f"root, r = {math.sqrt(limits.reliability):.2f}"
        )
    if limits.ceiling is not None:
        sentences.append(
            "a forecast equal to the observed |change| reaches, when all is measured again, "
            f"r = {limits.ceiling:.2f} {_shown(limits.ceiling_ci)}"
        )
    sentences.append(
        f"a random forecast exceeds r = {GOOD:g} in {limits.chance_above_good:.1%} of cases, a random ranking in "
        f"{limits.chance_ranking_above_good:.1%}"
    )
    sentences.append(f"a forecast with a true r of {GOOD:g} stands out from random ones in {limits.power:.0%} of cases")
    lines = [textwrap.wrap(sentence, LINE, initial_indent="- ", subsequent_indent="  ") for sentence in sentences]
    return ["Limits of these outcomes as evidence about any forecast, at best:", *itertools.chain(*lines)]
