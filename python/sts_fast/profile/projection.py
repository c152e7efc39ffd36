"""A random map to few dimensions, for gradients and covariances that would otherwise be too wide."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from sts_fast.statistics import Doubles

# A residual stream no wider than this is not projected.
DIMS = 64


def projection(d_in: int, *, seed: int = 0, dims: int = DIMS) -> Doubles:
    """[d_in, r] random map that preserves inner products on average, E[Q Q^T] = 1; the identity where d_in <= dims.

    Its columns are orthogonal, which varies less than independent columns.
    """
    if d_in <= dims:
        return np.eye(d_in)
    Q = np.random.default_rng([seed, d_in]).standard_normal((dims, d_in))
    for i in range(dims):  # Gram-Schmidt, twice; LAPACK's QR may depend on the number of threads
        for _ in range(2):
            Q[i] -= np.einsum("j,ji->i", np.einsum("ji,i->j", Q[:i], Q[i]), Q[:i])
        Q[i] /= np.sqrt(np.einsum("i,i->", Q[i], Q[i]))
    scaled: Doubles = np.ascontiguousarray(Q.T) * np.sqrt(d_in / dims)
    return scaled
