"""Sparse features of a batch of activations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sts_fast.ops import _cpu, backend, cuda
from sts_fast.sae import SAE
from sts_fast.sae.rows import rows

if TYPE_CHECKING:
    from numpy.typing import NDArray


class SparseFeatures(NamedTuple):
    """The active features of n rows in compressed sparse row form.

    indptr:  [n + 1] int64, row t holds entries indptr[t] to indptr[t + 1]
    indices: [n_active] int32, feature of the SAE, ascending within a row
    values:  [n_active] float32, its activation, never 0 (and negative only for abstopk)

    numpy arrays, or torch tensors on the CUDA device of the activations.
    """

    indptr: Any
    indices: Any
    values: Any

    def on_cpu(self) -> SparseFeatures:
        """The same as numpy arrays."""
        return SparseFeatures(*(part if isinstance(part, np.ndarray) else part.cpu().numpy() for part in self))


def encode(sae: SAE, acts: Any, columns: NDArray[np.int64] | None = None) -> SparseFeatures:
    """The active features of each row.

    acts:    [n_tokens, d_in] floating point; borrowed or copied, see sae.rows. Of [batch, seq, d_in] the rows are
             those of reshape(-1, d_in); hook_z may give [n_tokens, n_heads, d_head]
    columns: [n_columns] int64, strictly increasing: only these features

    Raises ValueError, naming the argument, for a wrong shape or dtype, NaN or infinity; InputError for a CUDA tensor
    where there are no CUDA ops.
    """
    device = backend.cuda_device_of(acts)
    acts = rows(acts, sae.d_in)
    if device is None:
        return SparseFeatures(*_cpu.encode_sparse(backend.encoder(sae), acts, columns))
    return SparseFeatures(*cuda.encode_sparse(backend.cuda_encoder(sae, device), acts, columns))
