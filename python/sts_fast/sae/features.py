"""Sparse features of a batch of activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
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

    def rows(self, start: int, stop: int) -> SparseFeatures:
        """Rows start to stop, of which those that there are; numpy arrays share their memory."""
        indptr = self.indptr[start : stop + 1]
        entries = slice(int(indptr[0]), int(indptr[-1]))
        return SparseFeatures(indptr - indptr[0], self.indices[entries], self.values[entries], self.d_sae)

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
