"""The devices that torch computes on: their names, memory and precision."""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Any

from sts_fast.errors import InputError

if TYPE_CHECKING:
    import torch

ACCELERATORS = ("cuda", "xpu", "mps")  # ROCm's devices are named cuda; auto takes the first that there is


def device_named(name: str) -> torch.device:
    """The device of --device, there or not; 'auto' is an accelerator if there is one. Raises InputError for no name."""
    import torch

    if not re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:\d+)?", name):
        raise InputError(f"--device is auto, cpu, cuda, cuda:N, xpu, xpu:N or mps, not '{name}'")
    if name == "auto":
        return torch.device(next(filter(_is_there, ACCELERATORS), "cpu"))
    return torch.device(name)


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Moves a tensor to a device; to a CUDA device asynchronously."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@cache
def device_of_doubles(device: torch.device) -> torch.device:
    """The device itself, or the CPU where it computes no float64, as on a Mac."""
    import torch

    try:
        (torch.ones(2, dtype=torch.float64, device=device) / 3).sum()
    except (NotImplementedError, RuntimeError, TypeError):
        return torch.device("cpu")
    return device


def doubled(tensor: torch.Tensor) -> torch.Tensor:
    """The same as float64, on its device or, where that has none, on the CPU."""
    return tensor.to(device_of_doubles(tensor.device)).double()


def synchronize(device: torch.device) -> None:
    """Waits until the device has done everything asked of it."""
    if device.type != "cpu":
        _module(device).synchronize(*([] if device.type == "mps" else [device]))


def forget_freed(device: torch.device) -> None:
    """Gives the memory that torch keeps for later back to the device."""
    if device.type != "cpu":
        _module(device).empty_cache()


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on an accelerator; None where torch does not report them."""
    module = _module(device)
    if device.type == "mps":
        return int(module.recommended_max_memory() - module.driver_allocated_memory())
    if not hasattr(module, "mem_get_info"):
        return None
    free, _ = module.mem_get_info(device)
    return int(free) + int(module.memory_reserved(device)) - int(module.memory_allocated(device))


def name_of(device: torch.device) -> str:
    """Of the model of an accelerator; else the kind of device."""
    return str(_module(device).get_device_name(device)) if device.type in ("cuda", "xpu") else device.type


def _module(device: torch.device) -> Any:
    import torch

    return getattr(torch, device.type)


def _is_there(kind: str) -> bool:
    import torch

    module = getattr(torch, kind, None)
    return module is not None and bool(module.is_available())
