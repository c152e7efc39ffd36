"""Compares a forecast with the measured changes, and shows how much the comparison proves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sts_fast.errors import InputError
from sts_fast.forecast.estimators import SIGNED
from sts_fast.outcomes.differences import ForecastModel, other_models
from sts_fast.outcomes.names import match_domains
from sts_fast.outcomes.outcomes import Outcome, Outcomes, cautions, read_outcomes, without_groups
from sts_fast.outcomes.validate.reading import (
    ScoreSource,
    content_of,
    interval_of,
    outcome_arrays,
    read_scores,
    score_arrays,
    text_arrays,
    unmatched,
)
from sts_fast.outcomes.validate.record import DomainResult
from sts_fast.outcomes.validate.statistics import (
    Draws,
    associate,
    associate_control,
    given_text,
    outcome_limits,
    sign_auc,
    without_most_helpful,
)
from sts_fast.outcomes.validate.validation import Validation, verdict


def validate(
    scores: ScoreSource,
    outcomes: Outcomes | Mapping[str, Outcome] | None = None,
    *,
    before: str | Path | None = None,
    after: str | Path | None = None,
    metric: str | Sequence[str] | None = None,
    match: Mapping[str, str] | None = None,
    estimator: str = "act",
    strict: bool = False,
    seed: int = 0,
) -> Validation:
    """Compares a forecast with the measured change of its domains.

    scores:   a Forecast, the folder or scores.json of a run, its content, or domain -> score or (score, low, high)
    outcomes: domain -> Outcome; or give `before`, `after`, `metric` for read_outcomes
    match:    domain of the forecast -> name of its outcome, for names that do not match by themselves
    estimator: estimator of the scores, by its name in scores.json
    strict:   raises InputError where before and after were evaluated differently, or name another model than the
              forecast's, instead of a warning
    seed:     seed of every draw; the same seed gives the same numbers

    Raises InputError where scores or outcomes cannot be read or fewer than four domains are in both.
    """
    if outcomes is None:
        if before is None:
            raise ValueError("give outcomes, or before and after")
        outcomes = read_outcomes(before, after, metric=metric)
    known = outcomes.domains if isinstance(outcomes, Outcomes) else dict(outcomes)
    warnings = list(outcomes.warnings) if isinstance(outcomes, Outcomes) else []
    where, forecast = content_of(scores)
    predicted, controls = read_scores(where, forecast, estimator)
    how = outcomes if isinstance(outcomes, Outcomes) else Outcomes(known)
    mismatches = [*how.mismatches, *other_models(*how.models, ForecastModel.of(forecast))]
    if strict and mismatches:
        raise InputError(f"{'; '.join(mismatches)} (--strict)")
    warnings += [mismatch for mismatch in mismatches if mismatch not in warnings]
    said = [text for text in how.warnings if text not in how.mismatches]
    fitting = match_domains(list(predicted), known, own_names=how.own_names, given=match, said=said)
    names, groups = without_groups(fitting, how)
    scored = [name for name in predicted if name not in groups]
    measured = [name for name in known if name not in {fitting[group] for group in groups}]
    warnings += [*groups.values(), *unmatched(scored, measured, names, [*said, *groups.values()])]
    matched = {name: known[other] for name, other in names.items()}
    warnings += cautions(matched)

    score, score_sd = score_arrays(predicted, matched)
    change, stderr = outcome_arrays(matched)
    noise_known = bool(np.isfinite(stderr).any()), bool(score_sd.any())
    draws = Draws.make(len(matched), seed)
    limits = outcome_limits(matched, seed=seed)
    is_signed = estimator in SIGNED
    size_score = np.abs(score) if is_signed else score
    size = associate(size_score, score_sd, change, stderr, np.abs, draws)
    signed = associate(score, score_sd, change, stderr, np.positive, draws)
    if size is None or signed is None:
        raise InputError(f"all {len(matched)} domains in both have the same score: nothing can be compared")
    control_results = {
        name: association
        for name, values in controls.items()
        if (association := associate_control(values, list(matched), change, stderr, draws)) is not None
    }
    texts = text_arrays(controls, matched)
    of_size = given_text(size_score, score_sd, change, stderr, np.abs, texts, draws)
    rows = [
        DomainResult(
            name,
            float(score[i]),
            interval_of(predicted[name]),
            outcome.change / outcome.stderr if outcome.stderr else None,
            outcome,
        )
        for i, (name, outcome) in enumerate(matched.items())
    ]
    carried = [source for source, is_known in zip(("the outcomes", "the scores"), noise_known, strict=True) if is_known]
    return Validation(
        estimator=estimator,
        domains=rows,
        size=size,
        signed=signed,
        controls=control_results,
        limits=limits,
        ci_carries=" and ".join(carried) or "nothing",
        exact_permutation=draws.exact,
        seed=seed,
        verdict=verdict(rows, size, control_results, of_size, limits, without_most_helpful(size_score, np.abs(change))),
        warnings=warnings,
        mismatches=mismatches,
        sign_auc=sign_auc(score, change) if is_signed else None,
        size_given_text=of_size,
        signed_given_text=given_text(score, score_sd, change, stderr, np.positive, texts, draws),
    )
