"""Finds the features that RL will shift, from completions and their advantages, in three ways.

| way         | D_N contains the features                                                                      |
|-------------|------------------------------------------------------------------------------------------------|
| correlation | whose activity on a completion's tokens correlates most with its advantage, in either sign     |
| gradient    | whose rows of the policy gradient at the hook are the largest                                  |
| step        | that a step along that gradient shifts most                                                    |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from sts_fast.data.prompts import PromptSet
from sts_fast.forecast.dims import N_REPLICATES, Shift, shift_of
from sts_fast.forecast.options import Settings
from sts_fast.model.reader import Reader
from sts_fast.ops.shift import ShiftStats
from sts_fast.profile.profile import Profile
from sts_fast.profile.read import read_profiles
from sts_fast.sae import SAE
from sts_fast.signed.gradients import HookedModel
from sts_fast.signed.objectives import PolicyLoss
from sts_fast.signed.push import Features, Push
from sts_fast.statistics import resamples

if TYPE_CHECKING:
    from numpy.typing import NDArray

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
    """One reading of completions, for all SAEs; D_N contains the features with the largest |r| with the advantage.

    r is Pearson's correlation of h_j(x_t) with A_i, over the tokens t of all completions i.
    """
    profiles = read_profiles(
        reader, saes, "train", completions.prompt_set, settings, library=settings.kept_profiles,
        tell=partial(settings.tell, f"features of {completions.prompt_set.name}"),
    )  # fmt: skip
    everyone = np.ones((len(completions.advantages), 1))
    found = []
    for profile in profiles:
        deviation = _deviation(profile)
        of_all = _correlation(profile, completions.advantages, everyone, deviation)[:, 0]
        resampled = _correlation(profile, completions.advantages, completions.draws(settings.seed), deviation)
        values = {"advantage": completions.advantages}
        found.append(
            shift_of(profile, np.abs(of_all), np.abs(resampled), settings, of_change=False, prompt_values=values)
        )
    return found


def _deviation(profile: Profile) -> Doubles:
    """[d_sae] standard deviation of each feature over all tokens."""
    n = profile.n_tokens
    mean = profile.rows.totals("sum_h") / n
    deviation: Doubles = np.sqrt(np.maximum(profile.rows.totals("sum_sq_h") / n - mean**2, 0.0))
    return deviation


def _correlation(profile: Profile, advantages: Doubles, draws: Doubles, deviation: Doubles) -> Doubles:
    """[d_sae, n_draws] covariance of h_j with the advantage in each resampling, over both deviations in the whole set.

    draws: [n_completions, n_draws] how often each resampling drew each completion; 0 where one deviation is 0
    """
    n_tokens = profile.log.n_read.astype(np.float64)[:, None]
    A = advantages[:, None]
    drawn = np.maximum((draws * n_tokens).sum(axis=0), 1.0)
    sums = profile.rows.matrix("sum_h").T @ np.concatenate([draws, draws * A], axis=1)
    of_h, of_products = sums[:, : draws.shape[1]], sums[:, draws.shape[1] :]
    covariance = of_products / drawn - of_h / drawn * ((draws * A * n_tokens).sum(axis=0) / drawn)
    mean = float((A * n_tokens).sum() / n_tokens.sum())
    spread = float(np.sqrt((n_tokens * (A - mean) ** 2).sum() / n_tokens.sum()))
    both = (deviation * spread)[:, None]
    correlations: Doubles = np.divide(covariance, both, out=np.zeros_like(covariance), where=both > 0)
    return correlations


def gradient_shift(push: Push, read: Shift, settings: Settings) -> Shift:
    """The shift whose D_N contains the features with the largest rows of the policy gradient M, by ||M[j]||^2.

    push: measured with n_folds=N_FOLDS; read: the result of `correlation_shifts` for the same completions
    """
    if push.folds is None:
        raise ValueError("the push must be measured with its folds")
    draws = resamples(N_FOLDS, settings.seed, "folds", N_REPLICATES)
    products = np.stack([np.einsum("jr,fjr->jf", fold, push.folds) for fold in push.folds], axis=1)
    return shift_of(
        read.profile,
        np.einsum("jr,jr->j", push.direction, push.direction) * push.norm**2,
        np.einsum("kf,jfg,kg->jk", draws, products, draws),
        settings,
        of_change=False,
        name="gradient",
        prompt_values=read.prompt_values,
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
    features, W, draws = Features(sae), push.maps["step"].W, completions.draws(settings.seed)
    prompts = completions.prompt_set.prompts

    def shift() -> dict[str, NDArray[Any]]:
        import torch

        stats, done = ShiftStats(sae, n_replicates=N_REPLICATES), 0
        for rows in model.hook_rows(prompts):
            moved = torch.from_numpy(features.times(rows.x, W)[0]) @ torch.from_numpy(Q).T
            prompt_of = np.asarray(rows.prompts)[rows.prompt_of]
            stats.update(rows.x, (rows.x.double() + moved).to(rows.x.dtype), draws[prompt_of])
            done += len(rows.prompts)
            settings.tell("shift by a virtual step", done, len(prompts))
        return {"importance": stats.sum_sq_shift / stats.n_tokens, "resampled": stats.weighted_sq_shift}

    of_prompts = [prompt.read_plain for prompt in prompts]
    of = model.kept.arrays("shifts", [features.sha256, Q, W, of_prompts, draws], shift)
    return shift_of(
        read.profile,
        of["importance"],
        of["resampled"],
        settings,
        of_change=True,
        name="step",
        prompt_values=read.prompt_values,
    )
