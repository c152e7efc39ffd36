"""The encoder half of an SAE on a device, with weights prepared for the products."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sts_fast.ops import cuda_kernels
from sts_fast.ops.cuda_kernels import load
from sts_fast.ops.devices import device_of_doubles

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

PRECISIONS = ("bf16", "bf16x2", "fp32")
DEPTH_MULTIPLE = 64  # of the columns that the CUDA kernels read at a time


class Weights(NamedTuple):
    """W_enc on a device, prepared for the products.

    hi, lo:    [d_sae, depth] bfloat16 whose sum is W_enc's transpose; lo is None where hi alone is enough.
               For "fp32", hi is float32. depth is d_in, padded with zeros.
    b_dec_W:   [d_sae] float64, b_dec times these rounded weights
    """

    hi: torch.Tensor
    lo: torch.Tensor | None
    b_dec_W: NDArray[np.float64]


def prepare_weights(W_enc: Any, b_dec: NDArray[np.float32], device: torch.device, precision: str) -> Weights:
    """Copies W_enc [d_in, d_sae] to the device, a few rows at a time. Raises ValueError for NaN or infinity."""
    import torch

    d_in, d_sae = W_enc.shape
    depth = -(-d_in // DEPTH_MULTIPLE) * DEPTH_MULTIPLE
    doubles_on = device_of_doubles(device)
    bfloat16 = str(W_enc.dtype).endswith("bfloat16")
    hi = torch.zeros((d_sae, depth), dtype=torch.float32 if precision == "fp32" else torch.bfloat16, device=device)
    lo = torch.zeros_like(hi) if precision == "bf16x2" and not bfloat16 else None
    b_dec_W = torch.zeros(d_sae, dtype=torch.float64, device=doubles_on)
    n_rows = max(1, (cuda_kernels.WORKSPACE_BYTES // 8) // d_sae)
    for start in range(0, d_in, n_rows):
        part = W_enc[start : start + n_rows]
        part = torch.from_numpy(np.array(part)) if isinstance(part, np.ndarray) else part
        part = part.to(device).float().T
        finite = torch.isfinite(part).all(1)
        if not finite.all():
            raise ValueError(f"W_enc contains a NaN or infinity in column {int((~finite).nonzero()[0])}")
        rows = slice(start, start + part.shape[1])
        hi[:, rows] = part
        used = hi[:, rows].to(doubles_on).double()
        if lo is not None:
            lo[:, rows] = part - hi[:, rows].float()
            used += lo[:, rows].to(doubles_on).double()
        b_dec_W += used @ torch.from_numpy(b_dec[rows].astype(np.float64)).to(doubles_on)
    return Weights(hi, lo, b_dec_W.cpu().numpy())


class Encoder:
    """The encoder half of an SAE on a device; the arguments are those of _cpu.Encoder."""

    def __init__(
        self,
        weights: Weights,
        bias: NDArray[np.float32],
        *,
        d_in: int,
        precision: str,
        activation: str,
        scale: NDArray[np.float32],
        threshold: NDArray[np.float32] | None = None,
        gate_bias: NDArray[np.float32] | None = None,
        k: int = 0,
        input_norm: str = "none",
    ) -> None:
        import torch

        gate = np.maximum(threshold, 0) if threshold is not None else gate_bias
        given = {"bias": bias, "scale": scale, "threshold" if gate_bias is None else "gate_bias": gate}
        for name, values in given.items():
            if values is not None and np.isnan(values).any():
                raise ValueError(f"{name} contains a NaN at column {int(np.isnan(values).argmax())}")
        self.hi, self.lo = weights.hi, weights.lo
        self.device, self.precision = weights.hi.device, precision
        self.d_in, (self.d_sae, self.depth) = d_in, weights.hi.shape
        self.activation, self.k, self.input_norm = activation, k, input_norm
        self.vectors = [
            torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(self.device)
            for values in (scale, bias, np.zeros_like(bias) if gate is None else gate)
        ]
        self._subset: tuple[bytes, Encoder] | None = None

    @property
    def selects_top_k(self) -> bool:
        return self.activation in ("topk", "abstopk")

    def of_columns(self, columns: NDArray[np.int64]) -> Encoder:
        """The same with these features only; the last result is cached, for the kernels of any stream."""
        import torch

        key = columns.tobytes()
        if self._subset is None or self._subset[0] != key:
            index = torch.from_numpy(columns).to(self.device)
            subset = object.__new__(Encoder)
            subset.__dict__.update(self.__dict__)
            subset.hi, subset.lo = self.hi[index], None if self.lo is None else self.lo[index]
            subset.vectors = [values[index] for values in self.vectors]
            subset.d_sae, subset._subset = len(columns), None
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()  # another stream would not wait for the copies
            self._subset = (key, subset)
        found = self._subset[1]
        if self.device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            for tensor in (found.hi, found.lo, *found.vectors):
                if tensor is not None:  # its memory is this stream's too, until the kernels are done
                    tensor.record_stream(torch.cuda.current_stream(self.device))
        return found

    def strip(self, start: int, end: int) -> tuple[Any, Any]:
        """(prepared weights, vectors) of the features from start to end, for the kernels."""
        lo = None if self.lo is None else self.lo[start:end]
        prepared = load().PreparedRows(self.hi[start:end], lo)
        vectors = load().Vectors(*(values[start:end] for values in self.vectors), self.activation == "gated")
        return prepared, vectors
