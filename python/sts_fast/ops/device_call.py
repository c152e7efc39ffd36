"""One call of an op on tensors of a device: its arguments, checked, and the shape that every such op has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sts_fast.ops.device_encoder import Encoder
from sts_fast.sae.rows import check_array

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

MOST_ROWS_OF_A_CALL = 1 << 31  # a row's number is the upper half of a key

SUMS = ("sum_sq_shift", "sum_base", "sum_other", "sum_sq_base", "sum_sq_other", "n_fired_base", "n_fired_other")


class DeviceCall(ABC):
    """The rows of one call, and the checks of everything given with them; a backend adds them up.

    members: [n_tokens, d_in] tensors on the encoder's device, with their names
    columns: the features wanted; `encoder` is then that of these, unless it selects a row's largest
    """

    def __init__(
        self, encoder: Encoder, members: list[torch.Tensor], names: tuple[str, ...], columns: NDArray[np.int64] | None
    ) -> None:
        for acts, name in zip(members, names, strict=True):
            _check_acts(encoder, acts, name)
        if len({len(acts) for acts in members}) > 1:
            raise ValueError(
                f"{names[1]} must have as many rows as {names[0]} ({len(members[0])}), got {len(members[1])}"
            )
        self.encoder, self.members, self.names, self.columns = encoder, members, names, columns
        self.n_tokens = len(members[0])
        self.claimed: list[tuple[str, int, int]] = []
        if columns is not None:
            self.columns = columns = _checked_columns(columns, encoder.d_sae)
            if not encoder.selects_top_k and len(columns):
                self.encoder = encoder.of_columns(columns)
        self.n_columns = encoder.d_sae if columns is None else len(columns)

    @property
    def sums_on(self) -> torch.device:
        """The device of accumulators."""
        return self.encoder.device

    @abstractmethod
    def run(self, sums: list[torch.Tensor | None], rows: torch.Tensor | None, weighted: torch.Tensor | None) -> None:
        """Adds all rows to the sums, or none where a row is at fault, which raises ValueError.

        sums:     [n_columns] accumulators in the order of SUMS for pairs; sum_h, sum_sq_h and n_fired for others
        rows:     [n_tokens, K] float64 weights or targets, and weighted [n_columns, K] their accumulator
        """

    @cached_property
    def columns_tensor(self) -> torch.Tensor:
        import torch

        assert self.columns is not None
        return torch.from_numpy(self.columns).to(self.encoder.device)

    def check_sum(self, values: Any, name: str) -> None:
        import torch

        dtype = torch.int64 if name.startswith("n_fired") else torch.float64
        if not isinstance(values, torch.Tensor) or values.dtype != dtype or values.device != self.sums_on:
            raise ValueError(f"{name} must be a tensor of {dtype} on {self.sums_on}, got {described(values)}")
        if values.shape != (self.n_columns,):
            raise ValueError(f"{name} must have {self.n_columns} entries, got {list(values.shape)}")
        if not values.is_contiguous():
            raise ValueError(f"{name} must be C-contiguous")
        self.claim(values, name)

    def claim(self, sums: torch.Tensor, name: str) -> None:
        """Raises ValueError where other accumulators have some of the same memory."""
        begin, end = sums.data_ptr(), sums.data_ptr() + sums.nbytes
        for other, first, last in self.claimed:
            if begin < last and first < end:
                raise ValueError(f"{name} lies in the memory of {other}: pass a tensor of its own")
        self.claimed.append((name, begin, end))

    def check_table(self, rows: Any, rows_name: str, sums: Any, sums_name: str) -> torch.Tensor | None:
        """The [n_tokens, K] float64 weights or targets, on the device of the accumulators."""
        import torch

        if (rows is None) != (sums is None):
            raise ValueError(f"{rows_name} and {sums_name} must be given together")
        if rows is None:
            return None
        table = torch.as_tensor(rows)
        if table.dtype != torch.float64:
            raise ValueError(f"{rows_name} must be float64, got {table.dtype}")
        if table.ndim != 2:
            raise ValueError(f"{rows_name} must be [n_tokens, K], got {table.ndim} dimension(s)")
        if len(table) != self.n_tokens:
            raise ValueError(f"{rows_name} must have one row per token ({self.n_tokens}), got {len(table)}")
        if not isinstance(sums, torch.Tensor) or sums.dtype != torch.float64 or sums.device != self.sums_on:
            raise ValueError(f"{sums_name} must be a tensor of torch.float64 on {self.sums_on}, got {described(sums)}")
        wanted = (self.n_columns, table.shape[1])
        if sums.shape != wanted or not sums.is_contiguous():
            raise ValueError(f"{sums_name} must be {list(wanted)} and contiguous, got {list(sums.shape)}")
        self.claim(sums, sums_name)
        if not is_capturing(self.encoder.device) and not torch.isfinite(table.float()).all():
            row, column = (int(i) for i in (~torch.isfinite(table.float())).nonzero()[0])
            what = (
                "a number beyond float32, in which it is read"
                if torch.isfinite(table[row, column])
                else "a NaN or infinity"
            )
            raise ValueError(f"{rows_name} contains {what} at row {row}, column {column}")
        return table.to(self.sums_on).contiguous()

    def fault(self, member: int, row: int) -> ValueError:
        """The error of a row that is not finite."""
        import torch

        finite = torch.isfinite(self.members[member][row])
        return ValueError(
            f"{self.names[member]} contains a NaN or infinity at row {row}, column {int((~finite).nonzero()[0])}; "
            "drop such rows or repair them first"
        )


class CallType(Protocol):
    """A DeviceCall of some backend."""

    def __call__(
        self, encoder: Encoder, members: list[torch.Tensor], names: tuple[str, ...], columns: NDArray[np.int64] | None
    ) -> DeviceCall: ...


def accumulate_shift(
    call_type: CallType,
    encoder: Encoder,
    base: torch.Tensor,
    other: torch.Tensor,
    *,
    columns: NDArray[np.int64] | None = None,
    row_weights: Any = None,
    weighted_sq_shift: torch.Tensor | None = None,
    **sums: torch.Tensor | None,
) -> None:
    """As _cpu.accumulate_shift; activations may be float16 too, accumulators are tensors on `sums_on`."""
    if len({sums.get(name) is None for name in SUMS[1:]}) > 1:
        raise ValueError(f"{', '.join(SUMS[1:])} must be given all or none")
    call = call_type(encoder, [base, other], ("base", "other"), columns)
    for name in SUMS:
        if name == "sum_sq_shift" or sums.get(name) is not None:
            call.check_sum(sums[name], name)
    rows = call.check_table(row_weights, "row_weights", weighted_sq_shift, "weighted_sq_shift")
    call.run([sums.get(name) for name in SUMS], rows, weighted_sq_shift)


def accumulate_moments(
    call_type: CallType,
    encoder: Encoder,
    acts: torch.Tensor,
    targets: Any = None,
    *,
    sum_h: torch.Tensor,
    sum_sq_h: torch.Tensor,
    n_fired: torch.Tensor,
    sum_hy: torch.Tensor | None = None,
    columns: NDArray[np.int64] | None = None,
) -> None:
    """As _cpu.accumulate_moments; activations may be float16 too, accumulators are tensors on `sums_on`."""
    call = call_type(encoder, [acts], ("acts",), columns)
    for name, values in (("sum_h", sum_h), ("sum_sq_h", sum_sq_h), ("n_fired", n_fired)):
        call.check_sum(values, name)
    rows = call.check_table(targets, "targets", sum_hy, "sum_hy")
    call.run([sum_h, sum_sq_h, n_fired], rows, sum_hy)


def top_indices(values: torch.Tensor, n: int) -> torch.Tensor:
    """[n] int64 positions of the n largest values, largest first; among equals the lower position."""
    import torch

    if not 1 <= n <= len(values):
        raise ValueError(f"top {n} of {len(values)} features cannot be taken")
    return torch.sort(values, descending=True, stable=True).indices[:n]


def is_capturing(device: torch.device) -> bool:
    """Whether the calls of now are recorded for a CUDA graph."""
    import torch

    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _check_acts(encoder: Encoder, acts: Any, name: str) -> None:
    import torch

    if not isinstance(acts, torch.Tensor):
        raise ValueError(f"{name} must be a torch tensor, got {type(acts).__name__}")
    if acts.requires_grad:
        raise ValueError(f"{name} requires grad: pass its detach()")
    if acts.ndim != 2:
        raise ValueError(f"{name} must be [n_tokens, d_in], got {acts.ndim} dimension{'s' * (acts.ndim != 1)}")
    if acts.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{name} must be float32, bfloat16 or float16, got {acts.dtype}")
    if acts.device != encoder.device:
        raise ValueError(f"{name} must be on {encoder.device}, where the SAE is, got {acts.device}")
    if acts.shape[1] != encoder.d_in:
        raise ValueError(f"{name} must have d_in = {encoder.d_in} columns as W_enc has rows, got {acts.shape[1]}")
    if len(acts) >= MOST_ROWS_OF_A_CALL:
        raise ValueError(f"{name} must have fewer than 2^31 rows in one call, got {len(acts)}: pass it in parts")
    if acts.shape[1] > 1 and len(acts) and acts.stride(1) != 1:
        raise ValueError(
            f"{name} must be contiguous within a row (any stride between rows will do), "
            f"got an element stride of {acts.stride(1)}"
        )


def _checked_columns(columns: Any, d_sae: int) -> NDArray[np.int64]:
    numbers = np.asanyarray(columns)
    check_array(numbers, "columns")
    if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
        raise ValueError("columns must be a 1-dimensional array of integers")
    numbers = np.ascontiguousarray(numbers, np.int64)
    outside = (numbers < 0) | (numbers >= d_sae)
    if outside.any():
        at = int(outside.argmax())
        raise ValueError(f"columns must lie in [0, d_sae = {d_sae}), got {numbers[at]} at position {at}")
    falling = np.diff(numbers) <= 0
    if falling.any():
        at = int(falling.argmax()) + 1
        raise ValueError(
            f"columns must be strictly increasing, but position {at} holds {numbers[at]} after {numbers[at - 1]}"
        )
    return numbers


def described(values: Any) -> str:
    dtype, device = getattr(values, "dtype", None), getattr(values, "device", None)
    return type(values).__name__ if dtype is None else f"{dtype} on {device}"
