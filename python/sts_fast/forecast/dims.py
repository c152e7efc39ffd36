"""The features that a training set shifts: D_N, and the features of the controls beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from sts_fast.errors import InputError
from sts_fast.forecast import controls
from sts_fast.forecast.options import Settings
from sts_fast.model import explain
from sts_fast.ops.shift import top_indices
from sts_fast.profile.profile import Profile
from sts_fast.profile.rows import Quantity
from sts_fast.statistics import group_resamples

if TYPE_CHECKING:
    from sts_fast.statistics import Doubles, Indices

# Resamplings of the training prompts and of their draws of demonstrations, to show how stable D_N is; each costs one
# float64 per feature.
N_REPLICATES = 32


@dataclass(frozen=True)
class Shift:
    """The features that a training set shifts.

    name:         of the training set, or of the way in which its features were found
    profile:      of the training set
    importance:   [d_sae] the measure that ranks features for D_N; of_change: whether it is their mean squared change
    replicates:   [d_sae, N_REPLICATES] the same for resamplings of the prompts, up to a factor
    mean_activation: [d_sae] E_x h_j(x)
    feature_sets: by control, its features instead of D_N, [n] or [n_sets, n]; '' is D_N, most shifted first
    raw_sets:     by control, its dimensions of the residual stream, [n] or [n_sets, n]
    prompt_values: by name, [n_prompts] what else is known of each prompt, as a column of prompts.parquet
    """

    name: str
    profile: Profile
    importance: Doubles
    of_change: bool
    replicates: Doubles
    mean_activation: Doubles
    feature_sets: Mapping[str, Indices]
    raw_sets: Mapping[str, Indices]
    prompt_values: Mapping[str, Doubles]

    @property
    def top(self) -> Indices:
        """[top_n] D_N, most shifted first."""
        return self.feature_sets[""]

    def firings(self) -> explain.Firings:
        """An empty record of where the first features of D_N fire."""
        return explain.Firings(self.top[: explain.N_FEATURES], "score")

    def overlaps(self, top_n: int) -> Doubles:
        """[N_REPLICATES] share of D_N that each resampling of the prompts keeps."""
        kept = [len(np.intersect1d(self.top, top_indices(replicate, top_n))) for replicate in self.replicates.T]
        return np.asarray(kept) / top_n


def ranked_by(dims: str) -> Quantity:
    """The sums that rank features for D_N."""
    return "sum_h" if dims == "active" else "sum_sq_shift"


def measure_shift(profile: Profile, settings: Settings) -> Shift:
    """The shift of a training set: by what demonstrations (or training) change, or, for dims 'active', by activity.

    Raises InputError where the set has no token to measure it on, or features are too large for their sums.
    """
    of_change, quantity = settings.dims != "active", ranked_by(settings.dims)
    n = profile.n_pairs if of_change else profile.n_tokens
    if n == 0:
        raise InputError(
            f"'{profile.name}' has no token in common between its prompts without and with demonstrations: "
            "use --tokens all or --dims active"
        )
    # [N_REPLICATES, n_prompts] number of times that each resampling drew each prompt.
    draws = group_resamples(profile.prompt_set.draw_of, settings.seed, "shift", N_REPLICATES)
    replicates = profile.rows.matrix(quantity).T @ draws.T
    return shift_of(profile, profile.rows.totals(quantity) / n, replicates, settings, of_change=of_change)


def shift_of(
    profile: Profile,
    importance: Doubles,
    replicates: Doubles,
    settings: Settings,
    *,
    of_change: bool,
    name: str | None = None,
    prompt_values: Mapping[str, Doubles] = MappingProxyType({}),
) -> Shift:
    """The shift with D_N, the features of the largest importance, and the features of its controls.

    Raises InputError where features are too large for their sums.
    """
    if not np.isfinite(importance).all():
        source = profile.identity.sae["source"]
        raise InputError(f"the SAE {source} gives features too large to add up: give the SAE of this model")
    top, mean_activation = top_indices(importance, settings.top_n), profile.mean_activation()
    n_fired = profile.rows.totals("n_fired").astype(np.int64)
    ranking = controls.Ranking(top, importance, mean_activation, n_fired, profile.residuals, settings.seed)
    return Shift(
        name=name or profile.name,
        profile=profile,
        importance=importance,
        of_change=of_change,
        replicates=replicates,
        mean_activation=mean_activation,
        feature_sets={"": top} | _picked(ranking, "features"),
        raw_sets=_picked(ranking, "residual"),
        prompt_values=prompt_values,
    )


def _picked(ranking: controls.Ranking, of: str) -> dict[str, Indices]:
    """By control, its features, or its dimensions of the residual stream."""
    picking = [control for control in controls.CONTROLS if control.of == of]
    return {control.name: control.pick(ranking) for control in picking if control.pick is not None}
