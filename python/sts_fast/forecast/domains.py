"""Scores of a domain by its use of the shifted features: arithmetic on its profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sts_fast.errors import InputError
from sts_fast.forecast import controls
from sts_fast.forecast.dims import Shift
from sts_fast.forecast.estimators import BY_NAME, SIZES
from sts_fast.forecast.options import Settings
from sts_fast.forecast.run import DomainScore, Score
from sts_fast.model.explain import Firings
from sts_fast.model.log import AnswerLog
from sts_fast.profile.profile import Profile
from sts_fast.statistics import grouped_ratio_interval, resamples

if TYPE_CHECKING:
    from sts_fast.statistics import Doubles, Indices


@dataclass(frozen=True)
class Use:
    """A domain's use of the features that a training set shifts, and of those of the controls.

    sums:       by control ('' is D_N) and estimator, [n_prompts] what it adds up of each prompt
    raw_totals: by control and estimator, the same of dimensions of the residual stream, over all prompts
    mean_activation: [top_n] E_x h_j(x) of the features of D_N
    """

    profile: Profile
    sums: dict[tuple[str, str], Doubles]
    raw_totals: dict[tuple[str, str], float]
    mean_activation: Doubles

    @property
    def name(self) -> str:
        return self.profile.name

    def add_firings(self, firings: Firings) -> None:
        """Adds where the features of `firings` fire most in this domain."""
        rows, prompt_set, log = self.profile.rows, self.profile.prompt_set, self.profile.log
        entries = np.flatnonzero(np.isin(rows.indices, firings.features) & (rows.strongest_at >= 0))
        prompt_of, at = rows.prompt_of[entries], rows.strongest_at[entries]
        read = [prompt.positions[kept] for prompt, kept in zip(prompt_set.prompts, log.kept, strict=True)]
        positions = np.asarray([read[p][i] for p, i in zip(prompt_of, at, strict=True)], np.int64)
        firings.add(prompt_set, rows.indices[entries].astype(np.int64), prompt_of, positions, rows.strongest[entries])

    def n_terms(self, estimator: str, n_features: int = 1) -> Doubles:
        """[n_prompts] see Estimator."""
        log = self.profile.log
        return BY_NAME[estimator].n_terms(log.n_read, log.n_pairs, n_features)


def use_of(profile: Profile, shift: Shift, settings: Settings) -> Use:
    """How a domain uses the features that a training set shifts."""
    sums: dict[tuple[str, str], Doubles] = {}
    raw_totals: dict[tuple[str, str], float] = {}
    weights = np.stack([_weights(members, profile.rows.d_sae) for members in shift.feature_sets.values()], axis=1)
    for name in settings.sizes:
        of_sets = profile.rows.matrix(BY_NAME[name].sums) @ weights
        sums |= {(control, name): of_sets[:, i] for i, control in enumerate(shift.feature_sets)}
        totals = getattr(profile.residuals, BY_NAME[name].raw_sums).value
        raw_totals |= {(control, name): float(totals[dims].sum()) for control, dims in shift.raw_sets.items()}
    return Use(profile, sums, raw_totals, profile.mean_activation()[shift.top])


def _weights(sets: Indices, d_sae: int) -> Doubles:
    """[d_sae] weight of each feature: the share of the sets [n] or [n_sets, n] that contain it."""
    sets = np.atleast_2d(sets)
    return np.bincount(sets.ravel(), minlength=d_sae) / len(sets)


def domain_scores(
    uses: Sequence[Use], shift: Shift, answers: Mapping[str, AnswerLog], settings: Settings
) -> list[DomainScore]:
    if not uses:
        return []
    comparison = controls.Comparison(
        train=shift.profile.residuals,
        domains=[use.profile.residuals for use in uses],
        activations=np.stack([use.mean_activation for use in uses]) if "act" in settings.sizes else None,
        answers=[answers.get(use.name) for use in uses],
        train_questions=shift.profile.prompt_set.questions,
        domain_questions=[use.profile.prompt_set.questions for use in uses],
    )
    compared = {control: control.compare(comparison) for control in controls.CONTROLS if control.compare is not None}
    return [
        _domain_score(use, shift, {control: values[i] for control, values in compared.items()}, settings)
        for i, use in enumerate(uses)
    ]


def _domain_score(
    use: Use, shift: Shift, compared: Mapping[controls.Control, float | None], settings: Settings
) -> DomainScore:
    prompt_set = use.profile.prompt_set
    n_prompts = len(prompt_set.prompts)
    drawn = resamples(n_prompts, settings.seed, use.name)
    scores: dict[str, Score] = {}
    control_scores: dict[str, dict[str, float]] = {}
    for control, members in {**shift.feature_sets, **shift.raw_sets}.items():
        size = max(members.shape[-1], 1)
        for estimator in settings.sizes:
            n_terms = use.n_terms(estimator, size)
            if n_terms.sum() == 0:
                raise InputError(
                    f"domain '{use.name}' has no token to read for the estimator '{estimator}': its prompts without "
                    "and with demonstrations end differently, or all their tokens are special; leave the domain out"
                )
            if control in shift.raw_sets:
                ratio = use.raw_totals[control, estimator] / float(n_terms.sum())
            else:
                ratio = float(use.sums[control, estimator].sum() / n_terms.sum())
            if control:
                control_scores.setdefault(control, {})[estimator] = ratio
                continue
            groups = BY_NAME[estimator].groups(prompt_set.draw_of)
            interval = grouped_ratio_interval(use.sums[control, estimator], n_terms, drawn, groups)
            scores[estimator] = Score(ratio, interval)
    for compared_control, value in compared.items():
        if value is not None:
            control_scores[compared_control.name] = {compared_control.quantity: value}
        elif compared_control.quantity in SIZES:  # a number by estimator, none here
            control_scores[compared_control.name] = {}
    return DomainScore(
        name=use.name,
        scores=scores,
        n_prompts=n_prompts,
        n_skipped=prompt_set.n_too_long + prompt_set.n_unanswered,
        n_too_long=prompt_set.n_too_long,
        n_unanswered=prompt_set.n_unanswered,
        **use.profile.log.counts(),
        demonstrations=[list(draw) for draw in prompt_set.shown],
        controls=control_scores,
        change=None,
        change_interval=None,
    )
