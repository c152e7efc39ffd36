"""Sparse features of a batch of activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sts_fast.ops import _cpu, backend, cuda
from sts_fast.sae import SAE
from sts_fast.sae.rows import rows

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from scipy.sparse import csr_array


@dataclass(frozen=True, eq=False, repr=False)
class SparseFeatures:
    """The active features of n rows in compressed sparse row form; its length is n.

    indptr:  [n + 1] int64, row t holds entries indptr[t] to indptr[t + 1]
    indices: [n_active] int32, feature of the SAE, ascending within a row
    values:  [n_active] float32, its activation, never 0 (and negative only for abstopk)
    d_sae:   features of the SAE

    numpy arrays, or torch tensors on the CUDA device of the activations.
    """

    indptr: Any
    indices: Any
    values: Any
    d_sae: int

    @property
    def parts(self) -> tuple[Any, Any, Any]:
        """(indptr, indices, values)"""
        return self.indptr, self.indices, self.values

    def on_cpu(self) -> SparseFeatures:
        """The same as numpy arrays."""
        indptr, indices, values = (part if isinstance(part, np.ndarray) else part.cpu().numpy() for part in self.parts)
        return SparseFeatures(indptr, indices, values, self.d_sae)

    def to_scipy(self) -> csr_array:
        """[n, d_sae] float32 matrix of scipy, which shares the memory of features on the CPU."""
        from scipy.sparse import csr_array

        found = self.on_cpu()
        return csr_array((found.values, found.indices, found.indptr), shape=(len(self), self.d_sae))

    def to_torch(self) -> torch.Tensor:
        """[n, d_sae] float32 sparse CSR tensor, on the device of the features."""
        import torch

        parts = (torch.as_tensor(part) for part in self.parts)
        indptr, indices, values = (part.long() if part.dtype == torch.int32 else part for part in parts)
        return torch.sparse_csr_tensor(indptr, indices, values, size=(len(self), self.d_sae), check_invariants=False)

    def to_dense(self) -> Any:
        """[n, d_sae] float32, a numpy array, or a tensor on the device of the features; for few rows."""
        if isinstance(self.values, np.ndarray):
            return self.to_scipy().toarray()
        return self.to_torch().to_dense()

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def __repr__(self) -> str:
        mean = len(self.values) / max(len(self), 1)
        return f"SparseFeatures({len(self):,} rows of {self.d_sae:,} features, {mean:.3g} active in the mean)"


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
        return SparseFeatures(*_cpu.encode_sparse(backend.encoder(sae), acts, columns), sae.d_sae)
    return SparseFeatures(*cuda.encode_sparse(backend.cuda_encoder(sae, device), acts, columns), sae.d_sae)
