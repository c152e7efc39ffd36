"""Finds the features that RL will shift, from completions and their advantages, in three ways.

| way         | D_N contains the features                                                                      |
|-------------|------------------------------------------------------------------------------------------------|
| correlation | whose activity on a completion's tokens correlates most with its advantage, in either sign     |
| gradient    | whose rows of the policy gradient at the hook are the largest                                  |
| step        | that a step along that gradient shifts most                                                    |
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from sts_fast.data.prompts import PromptSet
from sts_fast.forecast import controls
from sts_fast.forecast.dims import N_REPLICATES, Ranked, Shift, shift_of
from sts_fast.forecast.options import Settings
from sts_fast.model.log import PromptLog
from sts_fast.model.reader import Reader
from sts_fast.ops.correlate import CorrelationStats
from sts_fast.ops.shift import ShiftStats
from sts_fast.sae import SAE
from sts_fast.signed.gradients import HookedModel
from sts_fast.signed.objectives import PolicyLoss
from sts_fast.signed.push import Features, Push
from sts_fast.statistics import resamples

if TYPE_CHECKING:
    from sts_fast.statistics import Doubles, Indices

# Parts in which the policy gradient is kept, to estimate how stable its D_N is.
N_FOLDS = 8


@dataclass(frozen=True)
class Completions:
    """A policy's completions as they are read: each prompt with its completion, whose tokens are the positions read.

    prompt_set: one prompt per completion, completions of one prompt side by side
    advantages: [n] float64 of each; group_of: [n] int64 number of the prompt it answers, from 0 without gaps
    """

    prompt_set: PromptSet
    advantages: Doubles
    group_of: Indices

    @property
    def objective(self) -> PolicyLoss:
        return PolicyLoss(self.advantages, self.group_of)

    def draws(self, seed: int) -> Doubles:
        """[n, N_REPLICATES] how often each resampling of the prompts drew the group of each completion."""
        n_groups = int(self.group_of.max()) + 1
        return resamples(n_groups, seed, "shift", N_REPLICATES).T[self.group_of]


def correlation_shifts(
    reader: Reader, saes: Sequence[SAE], completions: Completions, settings: Settings
) -> list[Shift]:
    """One pass over completions, for all SAEs; D_N contains the features with the largest |r| with the advantage.

    r is Pearson's correlation of h_j(x_t) with A_i, over the tokens t of all completions i. The targets of `stats` are
    the advantage, then for each resampling of the prompts how often it drew t's prompt, then that times the advantage.
    """
    prompt_set, n = completions.prompt_set, len(completions.prompt_set.prompts)
    draws, A = completions.draws(settings.seed), completions.advantages[:, None]
    targets = np.concatenate([A, draws, draws * A], axis=1)
    sums = [CorrelationStats(sae, targets.shape[1]) for sae in saes]
    raws = [controls.RawShift(sae.d_in) for sae in saes]
    logs = [PromptLog("shift", prompt_set) for _ in saes]
    for log in logs:
        log.values["advantage"] = completions.advantages
    at = [reader.hooks.index(reader.hook(sae)) for sae in saes]
    done = 0
    for of_hooks in reader.rows("train", prompt_set):
        for stats, raw, log, hook in zip(sums, raws, logs, at, strict=True):
            rows = of_hooks[hook]
            stats.update(rows.base, targets[rows.base_of])
            raw.update(rows.base, rows.paired[:0], rows.demos[:0])
            log.record(rows)
        done += len(of_hooks[0].prompts)
        settings.tell(f"features of {prompt_set.name}", done, n)
    return [
        shift_of(
            sae,
            settings,
            prompt_set,
            Ranked(
                stats,
                importance=np.nan_to_num(np.abs(stats.pearson()[0])),
                replicates=_resampled_correlation(stats),
                mean_activation=stats.sum_h / max(stats.n_tokens, 1),
                n_fired=stats.n_fired,
            ),
            raw,
            log,
        )
        for sae, stats, raw, log in zip(saes, sums, raws, logs, strict=True)
    ]


def _resampled_correlation(stats: CorrelationStats) -> Doubles:
    """[d_sae, N_REPLICATES] |covariance| of each resampling, over the deviation of the feature in the whole set."""
    n = stats.n_tokens
    sum_y = stats.sum_y + n * stats.origin
    sum_hy = stats.sum_hy + np.outer(stats.sum_h, stats.origin)
    of_draws, of_products = slice(1, 1 + N_REPLICATES), slice(1 + N_REPLICATES, None)
    drawn = np.maximum(sum_y[of_draws], 1.0)
    covariance = sum_hy[:, of_products] / drawn - sum_hy[:, of_draws] / drawn * (sum_y[of_products] / drawn)
    variance = np.maximum(stats.sum_sq_h / n - (stats.sum_h / n) ** 2, 0.0)[:, None]
    deviation, nothing = np.sqrt(variance), np.zeros_like(covariance)
    correlations: Doubles = np.divide(np.abs(covariance), deviation, out=nothing, where=variance > 0)
    return correlations


def gradient_shift(sae: SAE, push: Push, read: Shift, settings: Settings) -> Shift:
    """The shift whose D_N contains the features with the largest rows of the policy gradient M, by ||M[j]||^2.

    push: measured with n_folds=N_FOLDS; read: the result of `correlation_shifts` for the same completions
    """
    if push.folds is None:
        raise ValueError("the push must be measured with its folds")
    draws = resamples(N_FOLDS, settings.seed, "folds", N_REPLICATES)
    products = np.stack([np.einsum("jr,fjr->jf", fold, push.folds) for fold in push.folds], axis=1)
    return _ranked_otherwise(
        sae,
        read,
        settings,
        name="gradient",
        importance=np.einsum("jr,jr->j", push.direction, push.direction) * push.norm**2,
        replicates=np.einsum("kf,jfg,kg->jk", draws, products, draws),
        n_fired=_n_fired(read),
        stats=read.stats,
    )


def step_shift(
    model: HookedModel,
    sae: SAE,
    Q: Doubles,
    push: Push,
    read: Shift,
    completions: Completions,
    settings: Settings,
) -> Shift:
    """The shift whose D_N the virtual step W of `push` shifts most, by E_x ||h_j(x + W^T h(x)) - h_j(x)||^2.

    x runs over the tokens of prompts and completions, except BOS and attention sinks. Q: the projection of the push;
    read: the result of `correlation_shifts` for the same completions
    """
    import torch

    features, W = Features(sae), push.maps["step"].W
    stats, draws = ShiftStats(sae, n_replicates=N_REPLICATES), completions.draws(settings.seed)
    prompts, done = completions.prompt_set.prompts, 0
    for rows in model.hook_rows(prompts):
        moved = torch.from_numpy(features.times(rows.x, W)[0]) @ torch.from_numpy(Q).T
        prompt_of = np.asarray(rows.prompts)[rows.prompt_of]
        stats.update(rows.x, (rows.x.double() + moved).to(rows.x.dtype), draws[prompt_of])
        done += len(rows.prompts)
        settings.tell("shift by a virtual step", done, len(prompts))
    return _ranked_otherwise(
        sae,
        read,
        settings,
        name="step",
        importance=stats.sum_sq_shift / stats.n_tokens,
        replicates=stats.weighted_sq_shift,
        n_fired=stats.n_fired_base,
        stats=stats,
    )


def _ranked_otherwise(
    sae: SAE,
    read: Shift,
    settings: Settings,
    *,
    name: str,
    importance: Doubles,
    replicates: Doubles,
    n_fired: Indices,
    stats: ShiftStats | CorrelationStats,
) -> Shift:
    """The same completions under another name, with their features ranked by `importance`."""
    log = copy.copy(read.log)
    log.name = name
    prompt_set = replace(read.prompt_set, name=name)
    ranked = Ranked(stats, importance, replicates, read.mean_activation, n_fired)
    return replace(shift_of(sae, settings, prompt_set, ranked, read.raw, log), mean_l0=read.mean_l0)


def _n_fired(read: Shift) -> Indices:
    if not isinstance(read.stats, CorrelationStats):
        raise TypeError("features of completions are read into CorrelationStats")
    return read.stats.n_fired
