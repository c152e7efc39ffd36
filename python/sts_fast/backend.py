"""Hands an SAE to the native core: folds its biases and picks the backend."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from sts_fast import _cpu
from sts_fast.errors import InputError
from sts_fast.sae import SAE

if TYPE_CHECKING:
    from numpy.typing import NDArray

_encoders: WeakKeyDictionary[SAE, _cpu.Encoder] = WeakKeyDictionary()


def encoder(sae: SAE) -> _cpu.Encoder:
    """The SAE as the core takes it, made once per SAE; W_enc is borrowed, b_dec is folded into the biases."""
    if sae not in _encoders:
        _encoders[sae] = _fold(sae)
    return _encoders[sae]


def rows(acts: Any) -> Any:
    """[n_tokens, d_in] activations, a view; those of hook_z come as [n_tokens, n_heads, d_head]."""
    if getattr(acts, "ndim", 2) != 3:
        return acts
    n_tokens, n_heads, d_head = acts.shape
    return acts.reshape(n_tokens, n_heads * d_head)


def cuda_missing_reason() -> str | None:
    """Why the CUDA ops cannot serve here, in words; None where they can."""
    if find_spec("sts_fast._cuda") is None:
        return "this build has no CUDA module: build it where nvcc is, with STS_CUDA=ON"
    try:
        from sts_fast import _cuda
    except ImportError as error:
        return f"the CUDA module does not load: {error}"
    return _cuda.missing_reason()


def _fold(sae: SAE) -> _cpu.Encoder:
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # the core refuses what is not finite, by name
            return _folded(sae)
    except ValueError as error:
        raise InputError(f"the SAE {sae.source} cannot be used: {error}") from error


def _folded(sae: SAE) -> _cpu.Encoder:
    # With s = input_scale: (s x - b_dec) W + b = s (x W) + (b - b_dec W), the bracket computed in float64. The core
    # multiplies x W by its scale, and so does nothing to x.
    shift = _b_dec_through_W_enc(sae) if sae.apply_b_dec_to_input else np.zeros(sae.d_sae)
    if sae.architecture == "gated":
        assert sae.r_mag is not None
        assert sae.b_mag is not None
        assert sae.b_gate is not None
        scale = np.exp(sae.r_mag.astype(np.float64))
        return _cpu.Encoder(
            sae.W_enc,
            (sae.b_mag - scale * shift).astype(np.float32),
            activation="gated",
            scale=(scale * sae.input_scale).astype(np.float32),
            # The core's gate looks at x W itself: s (x W) + b > 0 where x W + b / s > 0.
            gate_bias=((sae.b_gate - shift) / sae.input_scale).astype(np.float32),
            input_norm=sae.input_norm,
        )
    norm = np.ones(1) if sae.W_dec_norm is None else sae.W_dec_norm.astype(np.float64)
    scale = np.broadcast_to(norm * sae.input_scale, sae.d_sae)
    return _cpu.Encoder(
        sae.W_enc,
        ((sae.b_enc - shift) * norm).astype(np.float32),
        activation={"standard": "relu"}.get(sae.architecture, sae.architecture),
        scale=scale.astype(np.float32),
        threshold=sae.threshold,
        k=sae.k,
        input_norm=sae.input_norm,
    )


def _b_dec_through_W_enc(sae: SAE, rows: int = 128) -> NDArray[np.float64]:
    """[d_sae] float64 b_dec W_enc, a few rows of W_enc at a time; einsum, because BLAS may sum in another order."""
    total = np.zeros(sae.d_sae)
    for start in range(0, sae.d_in if sae.b_dec.any() else 0, rows):
        part = slice(start, start + rows)
        total += np.einsum("i,ij->j", sae.b_dec[part].astype(np.float64), _as_float64(sae.W_enc[part]))
    return total


def _as_float64(values: Any) -> NDArray[np.float64]:
    doubles: NDArray[np.float64] = (
        values.astype(np.float64) if isinstance(values, np.ndarray) else values.double().numpy()
    )
    return doubles
