"""Activations, in the forms in which arrays come, as rows that the native core reads."""

from __future__ import annotations

import math
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from sts_fast.errors import InputError, one_line

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

CONVERTED_AT_A_TIME = 1 << 22  # elements, so that Ctrl-C is answered in between
MOST_ELEMENTS = 1 << 48

_DLPACK_CUDA = 2


def rows(acts: Any, d_in: int, name: str = "acts") -> Any:
    """[n, d_in] rows, contiguous within a row: float32 or bfloat16, on a GPU float16 too.

    acts: [..., d_in] floating point, or [..., n_heads, d_head] as hook_z gives them; numpy, torch or DLPack
    name: of the argument, for errors

    Arrays of these dtypes are borrowed, whatever the stride between their rows. Others are copied: as float32 if
    they have another dtype or byte order, as they are if the elements of a row lie apart or are not aligned. An array
    of another library on a GPU becomes a torch tensor.

    Raises InputError for what is not floating point, masked, sparse, or too large for float32; for a tensor that
    requires grad; for another width.
    """
    if not is_tensor(acts) and not isinstance(acts, np.ndarray):
        acts = _adopted(acts, name)
    if is_tensor(acts):
        _check_float_tensor(acts, name)
        return _of_tensor(_flat(acts, d_in, name), name)
    _check_float_array(acts, name)
    return _of_array(_flat(acts, d_in, name), name)


def is_tensor(values: Any) -> bool:
    """True for a torch tensor; torch is not imported for it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(values, torch.Tensor)


def _is_on_cuda(acts: Any) -> bool:
    """True for an array of any library on a CUDA device."""
    if isinstance(acts, np.ndarray):
        return False
    if hasattr(acts, "is_cuda"):
        return bool(acts.is_cuda)
    return hasattr(acts, "__dlpack_device__") and acts.__dlpack_device__()[0] == _DLPACK_CUDA


def check_array(values: NDArray[Any], name: str) -> None:
    """Raises InputError for a masked array, whose mask the memory does not show."""
    if isinstance(values, np.ma.MaskedArray):
        raise InputError(
            f"{name} is a masked array, whose mask would be ignored: drop the masked rows, or pass {name}.filled(0)"
        )


def check_tensor(values: torch.Tensor, name: str) -> None:
    """Raises InputError for a tensor that requires grad, or whose values do not lie in rows of memory."""
    import torch

    if values.requires_grad:
        raise InputError(f"{name} requires grad, and no gradient flows through the native ops: pass {name}.detach()")
    if values.is_nested:
        raise InputError(f"{name} is a nested tensor: pass a dense one, such as torch.cat({name}.unbind())")
    if values.layout != torch.strided:
        raise InputError(f"{name} is a sparse tensor: pass {name}.to_dense()")
    if values.device.type == "meta":
        raise InputError(f"{name} is on the device 'meta', where tensors have no values: compute it on another device")


def _adopted(acts: Any, name: str) -> Any:
    """An array of another library, without a copy."""
    if hasattr(acts, "__dlpack__") and hasattr(acts, "__dlpack_device__"):
        if not _is_on_cuda(acts):
            with suppress(BufferError, RuntimeError, TypeError, ValueError):  # torch reads more dtypes and devices
                return np.from_dlpack(acts)
        import torch

        try:
            return torch.utils.dlpack.from_dlpack(acts)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"{name} cannot be read through DLPack ({one_line(error)}): pass a numpy array") from error
    raise InputError(
        f"{name} must be a numpy array or a torch tensor, got {type(acts).__name__}: "
        f"pass numpy.asarray({name}, 'float32')"
    )


def _check_float_array(acts: NDArray[Any], name: str) -> None:
    check_array(acts, name)
    if acts.dtype.kind != "f" and acts.dtype.name != "bfloat16":  # as other libraries add it to numpy
        read = "real" if acts.dtype.kind == "c" else "astype('float32')"
        raise _not_floats(acts.dtype, name, f"{name}.{read}")


def _check_float_tensor(acts: torch.Tensor, name: str) -> None:
    check_tensor(acts, name)
    if not acts.is_floating_point():
        read = "dequantize()" if acts.is_quantized else "real" if acts.is_complex() else "float()"
        raise _not_floats(acts.dtype, name, f"{name}.{read}")
    if acts.itemsize == 1:
        raise InputError(f"{name} is {acts.dtype}, whose scale is not known here: pass it as float32, scaled")


def _not_floats(dtype: Any, name: str, remedy: str) -> InputError:
    return InputError(f"{name} must be floating point, got {dtype}: if these are activations, pass {remedy}")


def _flat(acts: Any, d_in: int, name: str) -> Any:
    shape = tuple(int(size) for size in acts.shape)
    if len(shape) >= 2 and shape[-1] == d_in:
        n = math.prod(shape[:-1])
    elif len(shape) >= 3 and math.prod(shape[-2:]) == d_in:
        n = math.prod(shape[:-2])
    else:
        remedy = "give the activations that this SAE reads"
        if shape == (d_in,):
            remedy = f"for one row, pass {name}[None]"
        elif len(shape) == 2 and shape[0] == d_in:
            remedy = f"pass {name}.T"
        raise InputError(f"{name} must be [n_tokens, d_in] with d_in = {d_in}, got {list(shape)}: {remedy}")
    if n * d_in > MOST_ELEMENTS:
        raise InputError(f"{name} has {n} rows of {d_in} elements, which is more than 2^48 elements: pass it in parts")
    return acts if len(shape) == 2 else acts.reshape(n, d_in)


def _of_tensor(acts: torch.Tensor, name: str) -> Any:
    import torch

    if acts.is_neg():
        acts = acts.resolve_neg()
    on_cpu = acts.device.type == "cpu"
    if acts.dtype not in (torch.float32, torch.bfloat16, *(() if on_cpu else (torch.float16,))):
        return torch.from_numpy(_of_array(acts.numpy(), name)) if on_cpu else acts.float().contiguous()
    if acts.shape[1] > 1 and len(acts) and acts.stride(1) != 1:
        acts = acts.contiguous()
    return acts if acts.data_ptr() % acts.itemsize == 0 else acts.clone()


def _of_array(acts: NDArray[Any], name: str) -> NDArray[np.float32]:
    if acts.dtype == np.float32 and acts.flags.aligned:
        of_row = acts.strides[1] == acts.itemsize or acts.shape[1] == 1
        if acts.size == 0 or (of_row and acts.strides[0] % acts.itemsize == 0):
            return acts
    converted = np.empty(acts.shape, np.float32)
    step = max(1, CONVERTED_AT_A_TIME // max(1, acts.shape[1]))
    for start in range(0, len(acts), step):
        part, into = acts[start : start + step], converted[start : start + step]
        with np.errstate(over="ignore", invalid="ignore"):
            into[...] = part
        if acts.dtype.itemsize > into.itemsize and np.isinf(into).any():
            too_large = np.isinf(into) & np.isfinite(part)
            if too_large.any():
                row, column = (int(i) for i in np.argwhere(too_large)[0])
                raise InputError(
                    f"{name} has {part[row, column]:.3g} at row {start + row}, column {column}, which is too large for "
                    "float32, in which features are computed: drop such rows or repair them first"
                )
    return converted
