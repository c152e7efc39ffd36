"""Correlations of features with numbers known for each token."""

from __future__ import annotations

from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sts_fast import files
from sts_fast.errors import InputError
from sts_fast.ops import backend
from sts_fast.ops.sums import Statistics, Sums, zeros
from sts_fast.sae import SAE
from sts_fast.sae.rows import rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sts_fast.statistics import Doubles

# Float64 sums of many equal squares are off by about this, relative.
ROUNDING = 1e-13

_OF_FEATURES = ("sum_h", "sum_sq_h", "n_fired", "sum_hy")
_OF_TARGETS = ("sum_y", "sum_sq_y", "origin")


class CorrelationStats(Statistics):
    """Streaming sums behind the Pearson correlation of every feature h_j with K targets y_k; two instances add up.

    Targets are relative to `origin`, the targets of the first row, which keeps the sums small. Correlations do not
    depend on it, and sums in row order do not depend on how rows are split into updates.

    sum_h, sum_sq_h: [d_sae] float64, sums of h and of h^2
    n_fired:         [d_sae] int64, rows with h != 0
    sum_hy:          [d_sae, n_targets] float64, sum of h (y - origin)
    sum_y, sum_sq_y: [n_targets] float64, sums of (y - origin) and of its square
    n_tokens:        rows seen

    Rows on a GPU are summed there, and sums of features stay there until they are read.
    Threads that update one object at once: see Statistics; `origin` is then of the row that came first.
    """

    sum_h: Doubles
    sum_sq_h: Doubles
    n_fired: NDArray[np.int64]
    sum_hy: Doubles
    sum_y: Doubles
    sum_sq_y: Doubles
    origin: Doubles

    _NAMES = (*_OF_FEATURES, *_OF_TARGETS)

    def __init__(self, sae: SAE, n_targets: int) -> None:
        sum_hy = zeros(sae.d_sae, n_targets, "n_targets")
        of_features = {"sum_h": np.zeros(sae.d_sae), "sum_sq_h": np.zeros(sae.d_sae)}
        of_features |= {"n_fired": np.zeros(sae.d_sae, np.int64), "sum_hy": sum_hy}
        of_targets = {name: np.zeros(n_targets) for name in _OF_TARGETS}
        super().__init__(sae, sae.source, sae.fingerprint, Sums(0, of_features | of_targets))

    def update(self, acts: Any, targets: Any) -> None:
        """Adds rows.

        acts:    [n_tokens, d_in] floating point; borrowed or copied, see sae.rows
        targets: [n_tokens, n_targets] numbers

        Raises ValueError, naming the argument, for a wrong shape or dtype, or NaN or infinity, and InputError where
        features are too large for their sums; nothing is added then.
        """
        sae = self._sae_to_update()
        acts = rows(acts, sae.d_in)
        ops, encoder, sums_on = backend.of(sae, acts)
        y = backend.numbers(targets, "targets", (len(acts), len(self.sum_y)))
        with self._lock:
            before = self._sums
            sums = before.copies(_OF_FEATURES, sums_on)
            origin = y[0].copy() if before.n_tokens == 0 and len(y) else before["origin"]
            y = y - origin
            ops.accumulate_moments(encoder, acts, y, **sums)
            sums["origin"] = origin
            sums["sum_y"] = _add_in_order(before["sum_y"], y)
            sums["sum_sq_y"] = _add_in_order(before["sum_sq_y"], y * y)
            after = Sums(before.n_tokens + len(y), before.arrays | sums)
            after.require_finite()
            self._sums = after

    def pearson(self) -> Doubles:
        """[n_targets, d_sae] Pearson correlation; NaN where a feature or a target does not vary.

        r = (n S_hy - S_h S_y) / sqrt((n S_hh - S_h^2) (n S_yy - S_y^2))

        Raises ValueError before the first update.
        """
        sums = self._sums
        sums.require_tokens()
        n, sum_h, sum_y = sums.n_tokens, sums["sum_h"], sums["sum_y"]
        covariance = n * sums["sum_hy"] - np.outer(sum_h, sum_y)
        spread_h = n * sums["sum_sq_h"] - sum_h**2
        spread_y = n * sums["sum_sq_y"] - sum_y**2
        # The spread of a constant is zero up to rounding.
        spread_h[spread_h <= ROUNDING * n * sums["sum_sq_h"]] = np.nan
        spread_y[spread_y <= ROUNDING * n * sums["sum_sq_y"]] = np.nan
        r: Doubles = (covariance / np.sqrt(np.outer(spread_h, spread_y))).T
        return r

    def __add__(self, other: CorrelationStats) -> CorrelationStats:
        if self.sae_fingerprint != other.sae_fingerprint or self.sum_hy.shape != other.sum_hy.shape:
            raise ValueError("statistics of different SAEs or numbers of targets cannot be added")
        mine, theirs = self._sums, other._sums
        if mine.n_tokens == 0:
            mine, theirs = theirs, mine
        n, origin = theirs.n_tokens, mine["origin"]
        # Sums of y about the other's origin o' are about mine, o, after adding (o' - o) per row.
        move = (theirs["origin"] - origin) if n else np.zeros_like(origin)
        arrays = {name: mine[name] + theirs[name] for name in ("sum_h", "sum_sq_h", "n_fired")}
        arrays["sum_hy"] = mine["sum_hy"] + (theirs["sum_hy"] + np.outer(theirs["sum_h"], move))
        arrays["sum_y"] = mine["sum_y"] + (theirs["sum_y"] + n * move)
        arrays["sum_sq_y"] = mine["sum_sq_y"] + (theirs["sum_sq_y"] + 2 * move * theirs["sum_y"] + n * move**2)
        arrays["origin"] = origin
        total = object.__new__(CorrelationStats)
        sums = Sums(mine.n_tokens + n, arrays)
        Statistics.__init__(total, self.sae, self.sae_source, self.sae_fingerprint, sums)
        return total

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays that `save` writes."""
        sums = self._sums
        return {name: sums[name] for name in self._NAMES}

    def save(self, path: str | Path, **more: NDArray[np.int64]) -> None:
        """Writes the sums as safetensors, with `more` arrays beside them. Raises InputError where that fails."""
        saved = copy(self)  # arrays and n_tokens of one moment, whatever other threads add meanwhile
        metadata = {
            **{"n_tokens": str(saved.n_tokens)},
            **{"sae_source": self.sae_source, "sae_fingerprint": self.sae_fingerprint},
        }
        files.save_arrays(path, {**saved.arrays(), **more}, {"kind": "CorrelationStats", "version": "1", **metadata})

    @classmethod
    def load(cls, path: str | Path, sae: SAE | None = None) -> CorrelationStats:
        """Statistics saved by `save`; with their SAE they can be updated further.

        Raises InputError where the file is not such a file or belongs to another SAE.
        """
        arrays, metadata = files.load_arrays(path, "CorrelationStats")
        source, fingerprint = metadata["sae_source"], metadata.get("sae_fingerprint", "")
        for name in cls._NAMES:
            if name not in arrays:
                raise InputError(f"{path} has no '{name}': it is damaged, make it again")
        n_features = len(arrays["sum_h"])
        if sae is not None and sae.d_sae != n_features:
            raise InputError(f"{path} has statistics of {n_features} features, but the SAE has {sae.d_sae}")
        if sae is not None and sae.fingerprint != fingerprint:
            raise InputError(f"{path} has statistics of another SAE ({source or 'one in memory'})")
        stats = object.__new__(cls)
        sums = Sums(int(metadata["n_tokens"]), {name: arrays[name] for name in cls._NAMES})
        Statistics.__init__(stats, sae, source, fingerprint, sums)
        return stats


def _add_in_order(total: Doubles, rows: Doubles) -> Doubles:
    # accumulate adds one row after the other; sum() would add pairs, in an order that depends on their number.
    last: Doubles = np.add.accumulate(np.vstack([total, rows]), axis=0)[-1]
    return last
