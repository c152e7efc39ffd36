"""Decoding of features: rows of W_dec, gathered from the file for the features that are active."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sts_fast.sae.checkpoint import Matrix

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

MAX_ROWS = 1024
CHUNK = 4096  # features whose rows of W_dec are in memory at a time


@dataclass(frozen=True)
class Decoder:
    """W_dec in the checkpoint, read by rows.

    With features h, decoded = h W_dec + b_dec (+ x W_skip), in the units of the SAE's training.

    W_dec:  [d_sae, d_out]
    b_dec:  [d_out] float32
    W_skip: [d_in, d_out], of transcoders with a skip connection
    scale:  divisor that brings decoded rows to the units of the model
    gain:   [d_sae] float32 factor of each feature, of a decoder that was fine-tuned alone; None for 1
    """

    W_dec: Matrix
    b_dec: NDArray[np.float32]
    W_skip: Matrix | None = None
    scale: float = 1.0
    gain: NDArray[np.float32] | None = None

    def rows(self, features: Sequence[int] | NDArray[np.integer[Any]]) -> torch.Tensor:
        """[n_features, d_out] float32 rows of W_dec."""
        return self.W_dec.rows(features)

    def decode(
        self,
        indptr: NDArray[np.int64],
        indices: NDArray[np.int32],
        values: NDArray[np.float32],
        divisor: NDArray[np.float32] | None = None,
        *,
        bias: bool = True,
    ) -> torch.Tensor:
        """[n, d_out] float32 h W_dec + b_dec of sparse rows of features.

        divisor: [d_sae] float32, each feature is divided by its entry first
        bias:    whether b_dec is added
        """
        import torch

        n = len(indptr) - 1
        row_of = np.repeat(np.arange(n), np.diff(indptr))
        decoded = torch.from_numpy(self.b_dec).float().repeat(n, 1) * bias
        active = np.unique(indices)
        for start in range(0, len(active), CHUNK):
            chosen = active[start : start + CHUNK]
            place = np.searchsorted(chosen, indices)
            inside = (place < len(chosen)) & (chosen[np.minimum(place, len(chosen) - 1)] == indices)
            h = torch.zeros(n, len(chosen))
            h[torch.from_numpy(row_of[inside]), torch.from_numpy(place[inside])] = torch.from_numpy(values[inside])
            if divisor is not None:
                h /= torch.from_numpy(divisor[chosen])
            if self.gain is not None:
                h *= torch.from_numpy(self.gain[chosen])
            decoded += h @ self.W_dec.rows(chosen)
        return decoded
