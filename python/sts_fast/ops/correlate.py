"""Correlations of features with numbers known for each token."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sts_fast import files
from sts_fast.errors import InputError
from sts_fast.ops import _cpu, backend, cuda
from sts_fast.sae import SAE
from sts_fast.sae.rows import rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sts_fast.statistics import Doubles

# Float64 sums of many equal squares are off by about this, relative.
ROUNDING = 1e-13

_OF_FEATURES = ("sum_h", "sum_sq_h", "n_fired", "sum_hy")
_OF_TARGETS = ("sum_y", "sum_sq_y", "origin")


class CorrelationStats:
    """Streaming sums behind the Pearson correlation of every feature h_j with K targets y_k; two instances add up.

    Targets are relative to `origin`, the targets of the first row, which keeps the sums small. Correlations do not
    depend on it, and sums in row order do not depend on how rows are split into updates.

    sum_h, sum_sq_h: [d_sae] float64, sums of h and of h^2
    n_fired:         [d_sae] int64, rows with h != 0
    sum_hy:          [d_sae, n_targets] float64, sum of h (y - origin)
    sum_y, sum_sq_y: [n_targets] float64, sums of (y - origin) and of its square
    n_tokens:        rows seen

    Rows on a CUDA device are summed there, and sums of features stay there until they are read.
    """

    sum_h: Doubles
    sum_sq_h: Doubles
    n_fired: NDArray[np.int64]
    sum_hy: Doubles

    def __init__(self, sae: SAE, n_targets: int) -> None:
        self.sae: SAE | None = sae
        self.sae_source, self.sae_fingerprint = sae.source, sae.fingerprint
        self._sums = backend.Accumulators(
            sum_h=np.zeros(sae.d_sae),
            sum_sq_h=np.zeros(sae.d_sae),
            n_fired=np.zeros(sae.d_sae, np.int64),
            sum_hy=np.zeros((sae.d_sae, n_targets)),
        )
        self.sum_y: Doubles = np.zeros(n_targets)
        self.sum_sq_y: Doubles = np.zeros(n_targets)
        self.origin: Doubles = np.zeros(n_targets)
        self.n_tokens = 0

    def __getattr__(self, name: str) -> Any:
        if name in _OF_FEATURES:
            return self._sums[name]
        raise AttributeError(f"CorrelationStats has no '{name}'")

    def update(self, acts: Any, targets: Any) -> None:
        """Adds rows.

        acts:    [n_tokens, d_in] floating point; borrowed or copied, see sae.rows
        targets: [n_tokens, n_targets] numbers

        Raises ValueError, naming the argument, for a wrong shape or dtype, or NaN or infinity; nothing is added then.
        """
        if self.sae is None:
            raise ValueError(
                "these statistics were loaded without their SAE: give it to CorrelationStats.load to continue"
            )
        device = backend.cuda_device_of(acts)
        acts = rows(acts, self.sae.d_in)
        y = backend.numbers(targets, "targets", (len(acts), len(self.sum_y)))
        if len(y) == 0:
            return
        origin = y[0].copy() if self.n_tokens == 0 else self.origin
        y = y - origin
        sums = self._sums.on(device)
        if device is None:
            _cpu.accumulate_moments(backend.encoder(self.sae), acts, y, **sums)
        else:
            cuda.accumulate_moments(backend.cuda_encoder(self.sae, device), acts, y, **sums)
        self.origin = origin
        self.sum_y = _add_in_order(self.sum_y, y)
        self.sum_sq_y = _add_in_order(self.sum_sq_y, y * y)
        self.n_tokens += len(y)

    def pearson(self) -> Doubles:
        """[n_targets, d_sae] Pearson correlation; NaN where a feature or a target does not vary.

        r = (n S_hy - S_h S_y) / sqrt((n S_hh - S_h^2) (n S_yy - S_y^2))
        """
        n = self.n_tokens
        covariance = n * self.sum_hy - np.outer(self.sum_h, self.sum_y)
        spread_h = n * self.sum_sq_h - self.sum_h**2
        spread_y = n * self.sum_sq_y - self.sum_y**2
        # The spread of a constant is zero up to rounding.
        spread_h[spread_h <= ROUNDING * n * self.sum_sq_h] = np.nan
        spread_y[spread_y <= ROUNDING * n * self.sum_sq_y] = np.nan
        return (covariance / np.sqrt(np.outer(spread_h, spread_y))).T

    def __add__(self, other: CorrelationStats) -> CorrelationStats:
        if self.sae_fingerprint != other.sae_fingerprint or self.sum_hy.shape != other.sum_hy.shape:
            raise ValueError("statistics of different SAEs or numbers of targets cannot be added")
        total = object.__new__(CorrelationStats)
        total.sae, total.sae_source, total.sae_fingerprint = self.sae, self.sae_source, self.sae_fingerprint
        mine, theirs = (self, other) if self.n_tokens else (other, self)
        # Sums of y about the other's origin o' are about mine, o, after adding (o' - o) per row.
        move = (theirs.origin - mine.origin) if theirs.n_tokens else np.zeros_like(mine.origin)
        total.origin = mine.origin
        total._sums = backend.Accumulators(
            sum_h=mine.sum_h + theirs.sum_h,
            sum_sq_h=mine.sum_sq_h + theirs.sum_sq_h,
            n_fired=mine.n_fired + theirs.n_fired,
            sum_hy=mine.sum_hy + (theirs.sum_hy + np.outer(theirs.sum_h, move)),
        )
        total.sum_y = mine.sum_y + (theirs.sum_y + theirs.n_tokens * move)
        total.sum_sq_y = mine.sum_sq_y + (theirs.sum_sq_y + 2 * move * theirs.sum_y + theirs.n_tokens * move**2)
        total.n_tokens = mine.n_tokens + theirs.n_tokens
        return total

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays that `save` writes."""
        return {name: getattr(self, name) for name in (*_OF_FEATURES, *_OF_TARGETS)}

    def save(self, path: str | Path, **more: NDArray[np.int64]) -> None:
        """Writes the sums as safetensors, with `more` arrays beside them. Raises InputError where that fails."""
        metadata = {
            **{"n_tokens": str(self.n_tokens)},
            **{"sae_source": self.sae_source, "sae_fingerprint": self.sae_fingerprint},
        }
        files.save_arrays(path, {**self.arrays(), **more}, {"kind": "CorrelationStats", "version": "1", **metadata})

    @classmethod
    def load(cls, path: str | Path, sae: SAE | None = None) -> CorrelationStats:
        """Statistics saved by `save`; with their SAE they can be updated further.

        Raises InputError where the file is not such a file or belongs to another SAE.
        """
        arrays, metadata = files.load_arrays(path, "CorrelationStats")
        stats = object.__new__(cls)
        stats.sae_fingerprint = metadata.get("sae_fingerprint", "")
        stats.sae, stats.sae_source, stats.n_tokens = sae, metadata["sae_source"], int(metadata["n_tokens"])
        for name in (*_OF_FEATURES, *_OF_TARGETS):
            if name not in arrays:
                raise InputError(f"{path} has no '{name}': it is damaged, make it again")
        stats._sums = backend.Accumulators(**{name: arrays[name] for name in _OF_FEATURES})
        for name in _OF_TARGETS:
            setattr(stats, name, arrays[name])
        if sae is not None and sae.d_sae != len(stats.sum_h):
            raise InputError(f"{path} has statistics of {len(stats.sum_h)} features, but the SAE has {sae.d_sae}")
        if sae is not None and sae.fingerprint != stats.sae_fingerprint:
            raise InputError(f"{path} has statistics of another SAE ({stats.sae_source or 'one in memory'})")
        return stats


def _add_in_order(total: Doubles, rows: Doubles) -> Doubles:
    # accumulate adds one row after the other; sum() would add pairs, in an order that depends on their number.
    last: Doubles = np.add.accumulate(np.vstack([total, rows]), axis=0)[-1]
    return last
