"""Which features a training set shifts: D_N, and the features of the controls beside it."""

from __future__ import annotations

import zlib
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
from sts_fast.statistics import resamples

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sts_fast.statistics import Doubles, Indices

# Resamplings of the training prompts that tell how settled D_N is; each costs one float64 per feature.
N_REPLICATES = 32


@dataclass(frozen=True)
class Shift:
    """What the training set moves.

    stats:       sums per feature; importance: [d_sae] what D_N is ranked by
    replicates:  [d_sae, N_REPLICATES] the same for resamplings of the prompts, up to a factor
    top:         [top_n] D_N, most shifted first
    random, low_shift, most_active: [n_sets, top_n], [<= top_n], [top_n] features of the controls, ascending
    raw:         sums over the residual stream itself; raw_top: its dimensions that shift most
    """

    prompt_set: PromptSet
    stats: ShiftStats | CorrelationStats
    importance: Doubles
    replicates: Doubles
    mean_activation: Doubles
    mean_l0: float
    top: Indices
    random: Indices
    low_shift: Indices
    most_active: Indices
    raw: controls.RawShift
    raw_top: Indices
    log: PromptLog

    @property
    def name(self) -> str:
        return self.prompt_set.name

    def firings(self) -> explain.Firings:
        """Of the first of D_N, none found yet."""
        return explain.Firings(self.top[: explain.N_FEATURES], "score")

    def overlaps(self, top_n: int) -> Doubles:
        """[N_REPLICATES] share of D_N that each resampling of the prompts keeps."""
        kept = [len(np.intersect1d(self.top, top_indices(one, top_n))) for one in self.replicates.T]
        return np.asarray(kept) / top_n

    def feature_sets(self) -> list[Indices]:
        return [self.top, *self.random, self.low_shift, self.most_active]

    def weights(self, columns: Indices) -> dict[str, Doubles]:
        """[n_columns] by control ('' is D_N itself): how much each feature counts towards its score."""
        random = np.mean([np.isin(columns, features) for features in self.random], axis=0)
        return {
            "": np.isin(columns, self.top).astype(np.float64),
            "random": random,
            "low_shift": np.isin(columns, self.low_shift).astype(np.float64),
            "most_active": np.isin(columns, self.most_active).astype(np.float64),
        }


def measure_shifts(
    reader: Reader,
    saes: Sequence[SAE],
    prompt_set: PromptSet,
    settings: Settings,
    tuned: Reader | None,
) -> list[Shift]:
    """One pass over a training set, for all SAEs."""
    sums = [_ShiftSums(sae, prompt_set, settings) for sae in saes]
    at = [reader.hooks.index(reader.hook(sae)) for sae in saes]
    done = 0
    for of_hooks in reader.rows("train", prompt_set, tuned):
        for one, hook in zip(sums, at, strict=True):
            one.update(of_hooks[hook])
        done += len(of_hooks[0].prompts)
        settings.tell(f"shift of {prompt_set.name}", done, len(prompt_set.prompts))
    return [_shift(one, settings) for one in sums]


class _ShiftSums:
    """Sums over a training set's tokens, for one SAE."""

    def __init__(self, sae: SAE, prompt_set: PromptSet, settings: Settings) -> None:
        self.sae, self.prompt_set, self.of_active = sae, prompt_set, settings.dims == "active"
        n_prompts = len(prompt_set.prompts)
        # [n_prompts, N_REPLICATES] how often each resampling of the prompts drew each of them.
        self.draws = resamples(n_prompts, settings.seed, "shift", N_REPLICATES).T
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
    return shift_of(
        sums.sae,
        settings,
        stats=stats,
        importance=importance / stats.n_tokens,
        replicates=replicates,
        mean_activation=sum_base / stats.n_tokens,
        n_fired=n_fired,
        raw=sums.raw,
        log=sums.log,
        prompt_set=sums.prompt_set,
    )


def shift_of(
    sae: SAE,
    settings: Settings,
    *,
    prompt_set: PromptSet,
    stats: ShiftStats | CorrelationStats,
    importance: Doubles,
    replicates: Doubles,
    mean_activation: Doubles,
    n_fired: NDArray[np.int64],
    raw: controls.RawShift,
    log: PromptLog,
) -> Shift:
    """D_N, the top of what features are ranked by, and the features of its controls.

    n_fired: [d_sae] on how many of the `stats.n_tokens` tokens each feature fires; everything else as in Shift

    Raises InputError where features are too large for their sums.
    """
    if not np.isfinite(importance).all():
        raise InputError(f"the SAE {sae.source} gives features too large to add up: is it the SAE of this model?")
    top = top_indices(importance, settings.top_n)
    random_rng = np.random.default_rng([settings.seed, zlib.crc32(b"random features")])
    return Shift(
        prompt_set=prompt_set,
        stats=stats,
        importance=importance,
        replicates=replicates,
        mean_activation=mean_activation,
        mean_l0=float(n_fired.sum()) / stats.n_tokens,
        top=top,
        random=controls.random_sets(sae.d_sae, top, random_rng),
        low_shift=controls.low_shift(importance, n_fired, top),
        most_active=controls.most_active(mean_activation, settings.top_n),
        raw=raw,
        raw_top=raw.top(settings.top_n),
        log=log,
    )
