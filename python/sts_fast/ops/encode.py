"""The sparse features of a batch of activations, where the activations are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sts_fast.errors import InputError
from sts_fast.ops import backend
from sts_fast.ops.sums import TOO_LARGE
from sts_fast.sae import SAE
from sts_fast.sae.features import SparseFeatures
from sts_fast.sae.rows import rows
from sts_fast.sae.sae import provide_encode

if TYPE_CHECKING:
    from numpy.typing import NDArray


def encode(sae: SAE, acts: Any, columns: NDArray[np.int64] | None = None) -> SparseFeatures:
    """The active features of each row.

    acts:    [n_tokens, d_in] floating point; borrowed or copied, see sae.rows. Of [batch, seq, d_in] the rows are
             those of reshape(-1, d_in); hook_z may give [n_tokens, n_heads, d_head]
    columns: [n_columns] int64, strictly increasing: only these features

    Raises ValueError, naming the argument, for a wrong shape or dtype, NaN or infinity, and InputError where features
    are too large for float32.
    """
    acts = rows(acts, sae.d_in)
    ops, encoder, _ = backend.of(sae, acts)
    indptr, indices, values = ops.encode_sparse(encoder, acts, columns)
    finite = np.isfinite(values) if isinstance(values, np.ndarray) else values.isfinite()
    if not finite.all():
        raise InputError(TOO_LARGE)
    return SparseFeatures(indptr, indices, values, sae.d_sae)


provide_encode(encode)
