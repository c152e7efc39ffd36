"""Features as dense arrays, and their comparison with those of another library."""

from __future__ import annotations

from typing import Any

import numpy as np

import sts_fast
from sts_fast.sae import SAE


def dense(sae: SAE, x: np.ndarray) -> np.ndarray:
    """[n, d_sae] float32."""
    features = sts_fast.encode(sae, x)
    values = np.zeros((len(x), sae.d_sae), np.float32)
    values[np.repeat(np.arange(len(x)), np.diff(features.indptr)), features.indices] = features.values
    return values


def check_alike(ours: np.ndarray, theirs: np.ndarray, room: Any = None) -> int:
    """Values to 1e-5 of the largest, and the same firings but for those with no room; returns how many flip.

    room: [n, d_sae] how far each feature is from firing or falling silent; None where no flip is excused
    """
    scale = float(np.abs(theirs).max())
    flipped = (ours != 0) != (theirs != 0)
    assert flipped.sum() == 0 if room is None else not (flipped & (room > 1e-5 * scale)).any()
    assert np.abs(np.where(flipped, 0, ours - theirs)).max() <= 1e-5 * scale
    return int(flipped.sum())
