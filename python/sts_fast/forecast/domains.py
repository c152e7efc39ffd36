"""Scores of a domain by its use of the shifted features, from sums over its tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sts_fast.data.prompts import PromptSet
from sts_fast.errors import InputError
from sts_fast.forecast import controls
from sts_fast.forecast.dims import Shift
from sts_fast.forecast.estimators import BY_NAME, SIZES
from sts_fast.forecast.options import Settings
from sts_fast.forecast.run import DomainScore, Score
from sts_fast.model.explain import Firings
from sts_fast.model.log import AnswerLog, PromptLog
from sts_fast.model.reader import PairedRows, Reader
from sts_fast.ops.encode import SparseFeatures, encode
from sts_fast.ops.shift import ShiftStats
from sts_fast.sae import SAE
from sts_fast.statistics import grouped_ratio_interval, resamples

if TYPE_CHECKING:
    import torch

    from sts_fast.statistics import Doubles, Indices


@dataclass(frozen=True)
class DomainRead:
    """Sums over a domain's tokens: sums[training set, control, estimator] is [n_prompts].

    raw:     sums over the residual stream itself
    firings: by training set, where the first features of its D_N fire
    columns: features that were read; mean_activation: [n_columns] E_x h_j(x), zero where no estimator needs it
    """

    prompt_set: PromptSet
    log: PromptLog
    sums: dict[tuple[str, str, str], Doubles]
    raw: controls.RawShift
    firings: dict[str, Firings]
    columns: Indices
    mean_activation: Doubles

    def activations(self, features: Indices) -> Doubles:
        """[n_features] E_x h_j(x) of some of the columns."""
        activations: Doubles = self.mean_activation[np.searchsorted(self.columns, features)]
        return activations


def read_domain(
    reader: Reader,
    saes: Sequence[SAE],
    prompt_set: PromptSet,
    shifts_of: Sequence[Sequence[Shift]],
    settings: Settings,
) -> list[DomainRead]:
    """Sums of a domain by SAE, from one pass for all SAEs, training sets, controls and estimators."""
    sums = [_DomainSums(sae, prompt_set, shifts, settings) for sae, shifts in zip(saes, shifts_of, strict=True)]
    at = [reader.hooks.index(reader.hook(sae)) for sae in saes]
    done = 0
    for of_hooks in reader.rows("domain", prompt_set):
        for domain_sums, hook in zip(sums, at, strict=True):
            domain_sums.update(of_hooks[hook])
        done += len(of_hooks[0].prompts)
        settings.tell(prompt_set.name, done, len(prompt_set.prompts))
    return [domain_sums.read() for domain_sums in sums]


class _DomainSums:
    """Sums over a domain's tokens, for one SAE; see DomainRead."""

    def __init__(self, sae: SAE, prompt_set: PromptSet, shifts: Sequence[Shift], settings: Settings) -> None:
        self.sae, self.prompt_set = sae, prompt_set
        estimators = [BY_NAME[name] for name in settings.sizes]
        self.of_tokens = [estimator for estimator in estimators if estimator.of == "tokens"]
        self.of_pairs = [estimator for estimator in estimators if estimator.of == "pairs"]
        self.firings = {shift.name: shift.firings() for shift in shifts}
        self.columns = _columns(shift.feature_sets for shift in shifts)
        self.log = PromptLog("score", prompt_set)
        self.raw = controls.RawShift(sae.d_in)
        self.sum_h: Doubles = np.zeros(len(self.columns))
        # Only these dimensions of the residual stream are copied to the CPU.
        self.raw_dims = _columns(shift.raw_sets for shift in shifts)
        self.weights = {
            (shift.name, control): _weights(self.columns, sets)
            for shift in shifts
            for control, sets in shift.feature_sets.items()
        }
        self.raw_sets = {
            (shift.name, control): np.searchsorted(self.raw_dims, dims)
            for shift in shifts
            for control, dims in shift.raw_sets.items()
        }
        self.sums: dict[tuple[str, str, str], Doubles] = {
            (*key, name): np.zeros(len(prompt_set.prompts))
            for key in (*self.weights, *self.raw_sets)
            for name in settings.sizes
        }

    def update(self, rows: PairedRows) -> None:
        self.raw.update(rows.base, rows.paired[:0], rows.demos[:0])
        active = encode(self.sae, rows.base, self.columns).on_cpu()
        positions = np.concatenate(
            [self.prompt_set.prompts[i].positions[kept] for i, kept in zip(rows.prompts, rows.kept, strict=True)]
        )
        for firings in self.firings.values():
            firings.add(self.prompt_set, rows.base_of, positions, active)
        if self.of_tokens:
            self._add_activations(rows, active)
        if self.of_pairs:
            self._add_shifts(rows)
        self.log.record(rows)

    def read(self) -> DomainRead:
        mean_activation = self.sum_h / max(self.raw.n_tokens, 1)
        return DomainRead(self.prompt_set, self.log, self.sums, self.raw, self.firings, self.columns, mean_activation)

    def _add_activations(self, rows: PairedRows, active: SparseFeatures) -> None:
        n_prompts = len(self.prompt_set.prompts)
        prompt_of = np.repeat(rows.base_of, np.diff(active.indptr))
        column_of = np.searchsorted(self.columns, active.indices)
        values = active.values.astype(np.float64)
        self.sum_h += np.bincount(column_of, values, minlength=len(self.columns))
        residual = self._raw(rows.base)
        for estimator in self.of_tokens:
            name, term, raw_term = estimator.name, estimator.term(values), estimator.raw_term(residual)
            for key, weight in self.weights.items():
                self.sums[(*key, name)] += np.bincount(prompt_of, weight[column_of] * term, minlength=n_prompts)
            for key, dims in self.raw_sets.items():
                per_token = raw_term[:, dims].sum(axis=1)
                self.sums[(*key, name)] += np.bincount(rows.base_of, per_token, minlength=n_prompts)

    def _raw(self, rows: torch.Tensor) -> Doubles:
        """[n_tokens, n_raw_dims]"""
        import torch

        residual: Doubles = rows[:, torch.from_numpy(self.raw_dims).to(rows.device)].double().cpu().numpy()
        return residual

    def _add_shifts(self, rows: PairedRows) -> None:
        n_prompts = len(self.prompt_set.prompts)
        # One "replicate" per prompt, so that a single pass over the rows gives the sums of each prompt.
        of_prompt = (rows.paired_of[:, None] == np.asarray(rows.prompts)).astype(np.float64)
        stats = ShiftStats(self.sae, columns=self.columns, n_replicates=len(rows.prompts))
        stats.update(rows.paired, rows.demos, of_prompt)
        squares = (self._raw(rows.demos) - self._raw(rows.paired)) ** 2
        for estimator in self.of_pairs:
            for key, weight in self.weights.items():
                per_prompt = np.einsum("j,jp->p", weight, stats.weighted_sq_shift)
                self.sums[(*key, estimator.name)][rows.prompts] = per_prompt
            for key, dims in self.raw_sets.items():
                per_token = squares[:, dims].sum(axis=1)
                self.sums[(*key, estimator.name)] += np.bincount(rows.paired_of, per_token, minlength=n_prompts)


def _columns(sets: Iterable[Mapping[str, Indices]]) -> Indices:
    """[n_columns] union of all sets, ascending."""
    return np.unique(np.concatenate([members.ravel() for by_control in sets for members in by_control.values()]))


def _weights(columns: Indices, sets: Indices) -> Doubles:
    """[n_columns] weight of each column: the share of the sets [n] or [n_sets, n] that contain it."""
    weights: Doubles = np.mean([np.isin(columns, members) for members in np.atleast_2d(sets)], axis=0)
    return weights


def domain_scores(
    reads: Sequence[DomainRead], shift: Shift, answers: Mapping[str, AnswerLog], settings: Settings
) -> list[DomainScore]:
    if not reads:
        return []
    comparison = controls.Comparison(
        train=shift.raw,
        domains=[read.raw for read in reads],
        activations=np.stack([read.activations(shift.top) for read in reads]) if "act" in settings.sizes else None,
        answers=[answers.get(read.prompt_set.name) for read in reads],
        train_questions=shift.prompt_set.questions,
        domain_questions=[read.prompt_set.questions for read in reads],
    )
    compared = {control: control.compare(comparison) for control in controls.CONTROLS if control.compare is not None}
    return [
        _domain_score(read, shift, {control: values[i] for control, values in compared.items()}, settings)
        for i, read in enumerate(reads)
    ]


def _domain_score(
    read: DomainRead, shift: Shift, compared: Mapping[controls.Control, float | None], settings: Settings
) -> DomainScore:
    name, log, n_prompts = read.prompt_set.name, read.log, len(read.prompt_set.prompts)
    drawn = resamples(n_prompts, settings.seed, name)
    n_read, n_pairs = log.n_read.astype(np.float64), log.n_pairs.astype(np.float64)
    scores: dict[str, Score] = {}
    control_scores: dict[str, dict[str, float]] = {}
    for set_name, members in (shift.feature_sets | shift.raw_sets).items():
        size = max(members.shape[-1], 1)
        for estimator in settings.sizes:
            numerator = read.sums[shift.name, set_name, estimator]
            denominator = n_read if BY_NAME[estimator].of == "tokens" else n_pairs
            denominator = denominator * size if BY_NAME[estimator].per_feature else denominator
            if denominator.sum() == 0:
                raise InputError(
                    f"domain '{name}' has no token to read for the estimator '{estimator}': its prompts without and "
                    "with demonstrations end differently, or all their tokens are special; leave the domain out"
                )
            ratio = float(numerator.sum() / denominator.sum())
            if set_name:
                control_scores.setdefault(set_name, {})[estimator] = ratio
            else:
                draw_of = read.prompt_set.draw_of if BY_NAME[estimator].of == "pairs" else np.zeros(n_prompts, np.int32)
                scores[estimator] = Score(ratio, grouped_ratio_interval(numerator, denominator, drawn, draw_of))
    for control, value in compared.items():
        if value is not None:
            control_scores[control.name] = {control.quantity: value}
        elif control.quantity in SIZES:  # a number by estimator, none here
            control_scores[control.name] = {}
    return DomainScore(
        name=name,
        scores=scores,
        n_prompts=n_prompts,
        n_skipped=read.prompt_set.n_too_long + read.prompt_set.n_unanswered,
        n_too_long=read.prompt_set.n_too_long,
        n_unanswered=read.prompt_set.n_unanswered,
        **log.counts(),
        demonstrations=[list(draw) for draw in read.prompt_set.shown],
        controls=control_scores,
        change=None,
        change_interval=None,
    )
