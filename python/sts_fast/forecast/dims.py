"""The features that a training set shifts: D_N, and the features of the controls beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sts_fast.data.prompts import PromptSet
from sts_fast.errors import InputError
from sts_fast.forecast import controls
from sts_fast.forecast.options import Settings
from sts_fast.model import explain
from sts_fast.model.log import PromptLog
from sts_fast.model.reader import PairedRows, Reader
from sts_fast.ops.correlate import CorrelationStats
from sts_fast.ops.shift import ShiftStats, top_indices
from sts_fast.sae import SAE
from sts_fast.statistics import group_resamples

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sts_fast.statistics import Doubles, Indices

# Resamplings of the training prompts and of their draws of demonstrations, to show how stable D_N is; each costs one
# float64 per feature.
N_REPLICATES = 32


@dataclass(frozen=True)
class Shift:
    """The features that a training set shifts.

    stats:        sums per feature; importance: [d_sae] the measure that ranks features for D_N
    replicates:   [d_sae, N_REPLICATES] the same for resamplings of the prompts, up to a factor
    feature_sets: by control, its features instead of D_N, [n] or [n_sets, n]; '' is D_N, most shifted first
    raw:          sums over the residual stream itself
    raw_sets:     by control, its dimensions of the residual stream, [n] or [n_sets, n]
    """

    prompt_set: PromptSet
    stats: ShiftStats | CorrelationStats
    importance: Doubles
    replicates: Doubles
    mean_activation: Doubles
    mean_l0: float
    feature_sets: dict[str, Indices]
    raw: controls.RawShift
    raw_sets: dict[str, Indices]
    log: PromptLog

    @property
    def name(self) -> str:
        return self.prompt_set.name

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


@dataclass(frozen=True)
class Ranked:
    """Measures per feature by which D_N and its controls are chosen.

    stats, importance, replicates, mean_activation: as in Shift
    n_fired: [d_sae] number of the `stats.n_tokens` tokens on which each fires
    """

    stats: ShiftStats | CorrelationStats
    importance: Doubles
    replicates: Doubles
    mean_activation: Doubles
    n_fired: NDArray[np.int64]


def measure_shifts(
    reader: Reader,
    saes: Sequence[SAE],
    prompt_set: PromptSet,
    settings: Settings,
    tuned: Reader | None,
) -> list[Shift]:
    """The shift of a training set by SAE, from one pass for all SAEs."""
    sums = [_ShiftSums(sae, prompt_set, settings) for sae in saes]
    at = [reader.hooks.index(reader.hook(sae)) for sae in saes]
    done = 0
    for of_hooks in reader.rows("train", prompt_set, tuned):
        for shift_sums, hook in zip(sums, at, strict=True):
            shift_sums.update(of_hooks[hook])
        done += len(of_hooks[0].prompts)
        settings.tell(f"shift of {prompt_set.name}", done, len(prompt_set.prompts))
    return [_shift(shift_sums, settings) for shift_sums in sums]


class _ShiftSums:
    """Sums over a training set's tokens, for one SAE."""

    def __init__(self, sae: SAE, prompt_set: PromptSet, settings: Settings) -> None:
        self.sae, self.prompt_set, self.of_active = sae, prompt_set, settings.dims == "active"
        # [n_prompts, N_REPLICATES] number of times that each resampling drew each prompt.
        self.draws = group_resamples(prompt_set.draw_of, settings.seed, "shift", N_REPLICATES).T
        self.log = PromptLog("shift", prompt_set)
        self.raw = controls.RawShift(sae.d_in)
        self.shift = ShiftStats(sae, n_replicates=N_REPLICATES)
        self.active = CorrelationStats(sae, N_REPLICATES)

    def update(self, rows: PairedRows) -> None:
        if self.of_active:
            self.active.update(rows.base, self.draws[rows.base_of])
        else:
            self.shift.update(rows.paired, rows.demos, self.draws[rows.paired_of])
        self.raw.update(rows.base, rows.paired, rows.demos)
        self.log.record(rows)


def _shift(sums: _ShiftSums, settings: Settings) -> Shift:
    stats: ShiftStats | CorrelationStats
    if settings.dims == "active":
        active = sums.active
        stats, importance, sum_base, n_fired = active, active.sum_h, active.sum_h, active.n_fired
        replicates = active.sum_hy + np.outer(active.sum_h, active.origin)
    else:
        shift = sums.shift
        stats, importance, sum_base, n_fired = shift, shift.sum_sq_shift, shift.sum_base, shift.n_fired_base
        replicates = shift.weighted_sq_shift
    if stats.n_tokens == 0:
        raise InputError(
            f"'{sums.prompt_set.name}' has no token in common between its prompts without and with demonstrations: "
            "use --tokens all or --dims active"
        )
    ranked = Ranked(stats, importance / stats.n_tokens, replicates, sum_base / stats.n_tokens, n_fired)
    return shift_of(sums.sae, settings, sums.prompt_set, ranked, sums.raw, sums.log)


def shift_of(
    sae: SAE, settings: Settings, prompt_set: PromptSet, ranked: Ranked, raw: controls.RawShift, log: PromptLog
) -> Shift:
    """The shift with D_N, the features of the largest importance, and the features of its controls.

    Raises InputError where features are too large for their sums.
    """
    if not np.isfinite(ranked.importance).all():
        raise InputError(f"the SAE {sae.source} gives features too large to add up: give the SAE of this model")
    top = top_indices(ranked.importance, settings.top_n)
    ranking = controls.Ranking(top, ranked.importance, ranked.mean_activation, ranked.n_fired, raw, settings.seed)
    return Shift(
        prompt_set=prompt_set,
        stats=ranked.stats,
        importance=ranked.importance,
        replicates=ranked.replicates,
        mean_activation=ranked.mean_activation,
        mean_l0=float(ranked.n_fired.sum()) / ranked.stats.n_tokens,
        feature_sets={"": top} | _picked(ranking, "features"),
        raw=raw,
        raw_sets=_picked(ranking, "residual"),
        log=log,
    )


def _picked(ranking: controls.Ranking, of: str) -> dict[str, Indices]:
    """By control, its features, or its dimensions of the residual stream."""
    picking = [control for control in controls.CONTROLS if control.of == of]
    return {control.name: control.pick(ranking) for control in picking if control.pick is not None}
