"""Passes an SAE to the ops: folds its biases and picks the backend by the device of the activations."""

from __future__ import annotations

import math
from threading import RLock
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from sts_fast.errors import InputError
from sts_fast.ops import _cpu, cuda, torch_backend
from sts_fast.ops.device_encoder import PRECISIONS, prepare_weights
from sts_fast.ops.device_encoder import Encoder as DeviceEncoder
from sts_fast.ops.devices import device_of_doubles
from sts_fast.ops.verified import verdict
from sts_fast.sae import SAE
from sts_fast.sae.rows import check_array, check_tensor, is_tensor

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from sts_fast.statistics import Doubles

_encoders: WeakKeyDictionary[SAE, _cpu.Encoder] = WeakKeyDictionary()
_device_encoders: WeakKeyDictionary[SAE, dict[tuple[torch.device, str], DeviceEncoder]] = WeakKeyDictionary()
_making = RLock()  # so that threads that begin with one SAE fold it once
_precision: str | None = None


class Backend(NamedTuple):
    """What computes with an SAE's features where the rows are.

    ops:     a module with the functions of _cpu
    encoder: the SAE for these
    sums_on: the device of accumulators, which are tensors there; None for numpy arrays
    """

    ops: Any
    encoder: Any
    sums_on: torch.device | None


def of(sae: SAE, acts: Any) -> Backend:
    """The backend of rows: the native core on the CPU, our kernels on a CUDA device, torch everywhere else.

    Raises InputError where the SAE cannot be used.
    """
    device = device_of(acts)
    if device is None:
        return Backend(_cpu, encoder(sae), None)
    if kernels_serve(acts):
        return Backend(cuda, device_encoder(sae, device), device)
    return by_torch(sae, device)


def by_torch(sae: SAE, device: torch.device) -> Backend:
    """The backend of plain torch, which serves every device. Raises InputError where the SAE cannot be used."""
    precision = torch_backend.precision_on(device, precision_of(sae))
    return Backend(torch_backend, device_encoder(sae, device, precision), device_of_doubles(device))


def device_of(acts: Any) -> torch.device | None:
    """The device that activations are on, where they are also encoded; None for the CPU."""
    if not is_tensor(acts) or acts.device.type == "cpu":
        return None
    device: torch.device = acts.device
    return device


def kernels_serve(values: Any) -> bool:
    """Whether our CUDA kernels compute on a tensor's device; `verified` checks them where they are new."""
    return is_tensor(values) and values.is_cuda and verdict(values.device).loop is not None


def set_precision(name: str | None) -> None:
    """Sets the precision of products on a GPU: "bf16", "bf16x2" or "fp32".

    "bf16" rounds weights and activations. "bf16x2" writes each that is not bfloat16 already as the sum of two, with a
    relative error of about 1e-5; where a device cannot multiply these, it stands for "fp32". None: "bf16x2", and "bf16"
    for bfloat16 SAEs.

    Raises ValueError for another name. The CPU always computes in float32.
    """
    global _precision
    if name is not None and name not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got '{name}'")
    _precision = name


def precision_of(sae: SAE) -> str:
    """The precision of a GPU's products with this SAE's weights."""
    return _precision or ("bf16" if str(sae.W_enc.dtype).endswith("bfloat16") else "bf16x2")


def encoder(sae: SAE) -> _cpu.Encoder:
    """The SAE for the CPU core, made once per SAE; W_enc is borrowed, b_dec is folded into the biases."""
    with _making:
        if sae not in _encoders:
            _encoders[sae] = _named(sae, lambda: _cpu.Encoder(sae.W_enc, **_folded(sae, _b_dec_through_W_enc(sae))))
        return _encoders[sae]


def device_encoder(sae: SAE, device: torch.device, precision: str | None = None) -> DeviceEncoder:
    """The SAE for the ops of a device, made once per SAE, device and precision; W_enc is copied to the device.

    precision: of the products; None: precision_of(sae)
    """

    def make() -> DeviceEncoder:
        weights = prepare_weights(sae.W_enc, sae.b_dec, device, chosen)
        # b_dec goes through the weights as they were rounded: then x - b_dec does, and not x alone.
        return DeviceEncoder(weights, d_in=sae.d_in, precision=chosen, **_folded(sae, weights.b_dec_W))

    chosen = precision or precision_of(sae)
    with _making:
        encoders = _device_encoders.setdefault(sae, {})
        if (device, chosen) not in encoders:
            encoders[device, chosen] = _named(sae, make)
        return encoders[device, chosen]


def numbers(values: Any, name: str, shape: tuple[int, int]) -> Doubles:
    """[n_tokens, n] float64 numbers, one row for each token; a copy, unless it is contiguous float64 on the CPU.

    values: real numbers of any dtype: numpy, torch on any device, or lists
    Raises InputError for another shape, NaN or infinity, a masked array, or a tensor that requires grad.
    """
    if is_tensor(values):
        check_tensor(values, name)
        values = values.cpu().double().numpy() if values.is_floating_point() else values.cpu().numpy()
    else:
        values = np.asanyarray(values)
        check_array(values, name)
    if values.dtype.kind not in "fiub":
        raise InputError(f"{name} must be real numbers, got {values.dtype}: pass numpy.asarray({name}, 'float64')")
    if values.shape != shape:
        remedy = "one row for each token"
        if values.shape == shape[::-1]:
            remedy = f"numpy.transpose({name})"
        elif values.size == math.prod(shape) and shape[1] in (1, *values.shape[-1:]):
            remedy = f"numpy.reshape({name}, {shape})"
        raise InputError(f"{name} must have shape {shape}, but has {values.shape}: pass {remedy}")
    table = np.ascontiguousarray(values, np.float64)
    finite = np.isfinite(table)
    if not finite.all():
        row, column = (int(i) for i in np.argwhere(~finite)[0])
        raise InputError(f"{name} contains a NaN or infinity at row {row}, column {column}: drop such rows first")
    return table


def _named(sae: SAE, make: Any) -> Any:
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # the core rejects values that are not finite, by name
            return make()
    except ValueError as error:
        raise InputError(f"the SAE {sae.source} cannot be used: {error}") from error


def _folded(sae: SAE, b_dec_W: NDArray[np.float64]) -> dict[str, Any]:
    """An encoder's arguments, except W_enc."""
    # With s = input_scale: (s x - b_dec) W + b = s (x W) + (b - b_dec W), the bracket computed in float64. The core
    # multiplies x W by its scale, and leaves x unchanged.
    shift = b_dec_W if sae.apply_b_dec_to_input else np.zeros(sae.d_sae)
    if sae.architecture == "gated":
        assert sae.r_mag is not None
        assert sae.b_mag is not None
        assert sae.b_gate is not None
        scale = np.exp(sae.r_mag.astype(np.float64))
        return {
            "bias": (sae.b_mag - scale * shift).astype(np.float32),
            "activation": "gated",
            "scale": (scale * sae.input_scale).astype(np.float32),
            # The core's gate uses x W itself: s (x W) + b > 0 where x W + b / s > 0.
            "gate_bias": ((sae.b_gate - shift) / sae.input_scale).astype(np.float32),
            "input_norm": sae.input_norm,
        }
    norm = np.ones(1) if sae.W_dec_norm is None else sae.W_dec_norm.astype(np.float64)
    scale = np.broadcast_to(norm * sae.input_scale, sae.d_sae)
    return {
        "bias": ((sae.b_enc - shift) * norm).astype(np.float32),
        "activation": {"standard": "relu"}.get(sae.architecture, sae.architecture),
        "scale": scale.astype(np.float32),
        "threshold": sae.threshold,
        "k": sae.k,
        "input_norm": sae.input_norm,
    }


def _b_dec_through_W_enc(sae: SAE, rows: int = 128) -> NDArray[np.float64]:
    """[d_sae] float64 b_dec W_enc, a few rows of W_enc at a time; einsum, because BLAS may sum in another order."""
    total = np.zeros(sae.d_sae)
    for start in range(0, sae.d_in if sae.apply_b_dec_to_input and sae.b_dec.any() else 0, rows):
        part = slice(start, start + rows)
        total += np.einsum("i,ij->j", sae.b_dec[part].astype(np.float64), _as_float64(sae.W_enc[part]))
    return total


def _as_float64(values: Any) -> NDArray[np.float64]:
    doubles: NDArray[np.float64] = (
        values.astype(np.float64) if isinstance(values, np.ndarray) else values.double().numpy()
    )
    return doubles
