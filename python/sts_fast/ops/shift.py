"""Sums of how far each feature moves when demonstrations (or training) are added."""

from __future__ import annotations

from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sts_fast import files
from sts_fast.errors import InputError
from sts_fast.ops import backend, device_call
from sts_fast.ops.sums import Statistics, Sums, zeros
from sts_fast.sae import SAE
from sts_fast.sae.rows import check_array, rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sts_fast.statistics import Counts, Doubles

_SUMS = ("sum_sq_shift", "sum_base", "sum_other", "sum_sq_base", "sum_sq_other")
_COUNTS = ("n_fired_base", "n_fired_other")
_ARRAYS = (*_SUMS, *_COUNTS, "weighted_sq_shift")


class ShiftStats(Statistics):
    """Streaming sums behind E_x ||h_j(x) - h_j(demos, x)||^2 (STS paper, shifted dimensions); two instances add up.

    For h the features of `base`, g those of `other`, over paired rows (tokens), per feature, in float64:

    sum_sq_shift:  [n_columns] sum of (g - h)^2
    sum_base, sum_other:       [n_columns] sums of h and of g
    sum_sq_base, sum_sq_other: [n_columns] sums of h^2 and of g^2
    n_fired_base, n_fired_other: [n_columns] int64, rows with h != 0, with g != 0
    weighted_sq_shift: [n_columns, n_replicates] sum of w (g - h)^2 for each column of row weights (bootstrap)
    n_tokens:      rows seen
    columns:       [n_columns] int64, the features that are summed; by default all of the SAE's

    On the CPU the sums are the same, bit for bit, for any split of the rows into updates and any number of threads in
    the core; for threads that call one object, see Statistics.
    Rows on a GPU are summed there; the sums stay there until they are read, or rows come from elsewhere.
    """

    sum_sq_shift: Doubles
    sum_base: Doubles
    sum_other: Doubles
    sum_sq_base: Doubles
    sum_sq_other: Doubles
    n_fired_base: Counts
    n_fired_other: Counts
    weighted_sq_shift: Doubles

    _NAMES = _ARRAYS

    def __init__(self, sae: SAE, *, columns: NDArray[np.int64] | None = None, n_replicates: int = 0) -> None:
        self.d_sae = sae.d_sae
        if columns is not None:
            check_array(np.asanyarray(columns), "columns")
            if np.ndim(columns) != 1 or not np.issubdtype(np.asarray(columns).dtype, np.integer):
                raise ValueError("columns must be a 1-dimensional array of whole numbers, the indices of features")
        # A copy: sums belong to the columns that were given, also where the array changes later.
        self._subset = None if columns is None else np.array(columns, np.int64)
        n_columns = sae.d_sae if self._subset is None else len(self._subset)
        arrays = {
            **{name: np.zeros(n_columns) for name in _SUMS},
            **{name: np.zeros(n_columns, np.int64) for name in _COUNTS},
            "weighted_sq_shift": zeros(n_columns, n_replicates, "n_replicates"),
        }
        super().__init__(sae, sae.source, sae.fingerprint, Sums(0, arrays))

    @property
    def n_replicates(self) -> int:
        return int(self._sums.arrays["weighted_sq_shift"].shape[1])

    def update(self, base: Any, other: Any, row_weights: Doubles | None = None) -> None:
        """Adds paired rows.

        base, other: [n_tokens, d_in] floating point, row t is the same token; borrowed or copied, see sae.rows
        row_weights: [n_tokens, n_replicates] numbers, needed where n_replicates > 0

        Raises ValueError, naming the argument, for a wrong shape or dtype, or NaN or infinity, and InputError where
        features are too large for their sums; nothing is added then.
        """
        sae = self._sae_to_update()
        if (row_weights is not None) != (self.n_replicates > 0):
            raise ValueError(f"row_weights must be given exactly where n_replicates > 0, and it is {self.n_replicates}")
        base, other = rows(base, sae.d_in, "base"), rows(other, sae.d_in, "other")
        ops, encoder, sums_on = backend.of(sae, base)
        given: dict[str, Any] = {"columns": self._subset, "row_weights": None, "weighted_sq_shift": None}
        if row_weights is not None:
            given["row_weights"] = backend.numbers(row_weights, "row_weights", (len(base), self.n_replicates))
        names = [name for name in _ARRAYS if row_weights is not None or name != "weighted_sq_shift"]
        with self._lock:
            before = self._sums
            sums = before.copies(names, sums_on)
            ops.accumulate_shift(encoder, base, other, **(given | sums))
            after = Sums(before.n_tokens + len(base), before.arrays | sums)
            after.require_finite()
            self._sums = after

    @property
    def columns(self) -> NDArray[np.int64]:
        return np.arange(self.d_sae) if self._subset is None else self._subset

    @property
    def mean_squared_shift(self) -> Doubles:
        """[n_columns] E_x ||h_j(x) - h_j(demos, x)||^2."""
        return self._mean("sum_sq_shift")

    @property
    def mean_base(self) -> Doubles:
        """[n_columns] mean activation in `base`."""
        return self._mean("sum_base")

    @property
    def mean_other(self) -> Doubles:
        """[n_columns] mean activation in `other`."""
        return self._mean("sum_other")

    def _mean(self, name: str) -> Doubles:
        sums = self._sums
        sums.require_tokens()
        mean: Doubles = sums[name] / sums.n_tokens
        return mean

    def top(self, n: int) -> NDArray[np.int64]:
        """The n features that shift most, most shifted first; among equals the lower index.

        Raises ValueError before the first update, and where there are no n features.
        """
        sums = self._sums
        sums.require_tokens()
        return self.columns[top_indices(sums.arrays["sum_sq_shift"], n)]

    def __add__(self, other: ShiftStats) -> ShiftStats:
        if self.sae_fingerprint != other.sae_fingerprint or not np.array_equal(self.columns, other.columns):
            raise ValueError("statistics of different SAEs or features cannot be added")
        if self.n_replicates != other.n_replicates:
            raise ValueError("statistics with different numbers of replicates cannot be added")
        mine, theirs = self._sums, other._sums
        arrays = {name: mine[name] + theirs[name] for name in _ARRAYS}
        total = object.__new__(ShiftStats)
        total.d_sae, total._subset = self.d_sae, self._subset
        sums = Sums(mine.n_tokens + theirs.n_tokens, arrays)
        Statistics.__init__(total, self.sae, self.sae_source, self.sae_fingerprint, sums)
        return total

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays that `save` writes."""
        subset = {} if self._subset is None else {"columns": self._subset}
        sums = self._sums
        return {name: sums[name] for name in _ARRAYS} | subset

    def save(self, path: str | Path, **more: NDArray[np.int64]) -> None:
        """Writes the sums as safetensors, with `more` arrays beside them. Raises InputError where that fails."""
        saved = copy(self)  # arrays and n_tokens of one moment, whatever other threads add meanwhile
        metadata = {
            **{"n_tokens": str(saved.n_tokens), "d_sae": str(self.d_sae)},
            **{"sae_source": self.sae_source, "sae_fingerprint": self.sae_fingerprint},
        }
        files.save_arrays(path, {**saved.arrays(), **more}, {"kind": "ShiftStats", "version": "1", **metadata})

    @classmethod
    def load(cls, path: str | Path, sae: SAE | None = None) -> ShiftStats:
        """Statistics saved by `save`; with their SAE they can be updated further.

        Raises InputError where the file is not such a file or belongs to another SAE.
        """
        arrays, metadata = files.load_arrays(path, "ShiftStats")
        source, fingerprint = metadata["sae_source"], metadata.get("sae_fingerprint", "")
        stats = object.__new__(cls)
        stats.d_sae = int(metadata["d_sae"])
        if sae is not None and sae.d_sae != stats.d_sae:
            raise InputError(f"{path} has statistics of {stats.d_sae} features, but the SAE has {sae.d_sae}")
        if sae is not None and sae.fingerprint != fingerprint:
            raise InputError(f"{path} has statistics of another SAE ({source or 'one in memory'})")
        stats._subset = arrays.pop("columns", None)  # type: ignore[assignment]
        for name in _ARRAYS:
            if name not in arrays:
                raise InputError(f"{path} has no '{name}': it is damaged, make it again")
        sums = Sums(int(metadata["n_tokens"]), {name: arrays[name] for name in _ARRAYS})
        Statistics.__init__(stats, sae, source, fingerprint, sums)
        return stats


def top_indices(values: Any, n: int) -> NDArray[np.int64]:
    """[n] int64 positions of the n largest values (numpy, or a tensor), largest first; among equals the lower."""
    if not isinstance(n, (int, np.integer)):
        raise ValueError(f"top must be a whole number of features, got {n!r}")
    if not isinstance(values, np.ndarray):
        indices: NDArray[np.int64] = device_call.top_indices(values, n).cpu().numpy()
        return indices
    if not 1 <= n <= len(values):
        raise ValueError(f"top {n} of {len(values)} features cannot be taken")
    # Only those that reach the n-th largest value, a few of many, are sorted; NaN comes last.
    falling = -values
    candidates = np.flatnonzero(~(falling > np.partition(falling, n - 1)[n - 1]))
    return candidates[np.argsort(falling[candidates], kind="stable")[:n]]
