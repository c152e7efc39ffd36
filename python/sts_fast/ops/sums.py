"""Sums that grow by updates, whole ones only, from any number of threads."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sts_fast.errors import InputError
from sts_fast.ops.device_call import is_capturing
from sts_fast.sae import SAE

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray


TOO_LARGE = (
    "features of these rows are too large for float32, in which they are computed, and on a GPU their squares: "
    "give the activations that this SAE reads, or repair such rows first"
)


@dataclass(frozen=True)
class Sums:
    """Named arrays of sums over n_tokens rows. Nothing changes them: an update makes new ones.

    arrays: numpy arrays, or tensors on the CUDA device of the rows
    """

    n_tokens: int
    arrays: dict[str, Any]

    def __getitem__(self, name: str) -> NDArray[Any]:
        """The numpy array; a copy where it is on a device."""
        values = self.arrays[name]
        return values if isinstance(values, np.ndarray) else values.cpu().numpy()

    def copies(self, names: Iterable[str], device: torch.device | None) -> dict[str, Any]:
        """New arrays with the same sums, tensors on the device or, for None, numpy arrays."""
        if device is None:
            return {name: np.array(self[name]) for name in names}
        import torch

        return {name: torch.as_tensor(self.arrays[name]).to(device, copy=True) for name in names}

    def require_finite(self) -> None:
        """Raises InputError for infinity or NaN: features, or on a device their squares, are beyond float32."""
        floats = {name: values for name, values in self.arrays.items() if not name.startswith("n_fired")}
        for name, total in _totals(floats).items():
            if not math.isfinite(total):
                raise InputError(f"{name} would not be finite: {TOO_LARGE}")

    def require_tokens(self) -> None:
        """Raises InputError where there are no rows yet."""
        if self.n_tokens == 0:
            raise InputError("no tokens have been added yet: call update with rows first")


def _totals(arrays: dict[str, Any]) -> dict[str, float]:
    """The sum of each array, from their device in one piece; of none while a CUDA graph is captured."""
    with np.errstate(over="ignore", invalid="ignore"):
        totals = {name: float(values.sum()) for name, values in arrays.items() if isinstance(values, np.ndarray)}
    tensors = {name: values for name, values in arrays.items() if name not in totals}
    if tensors and not is_capturing(next(iter(tensors.values())).device):
        import torch

        found = torch.stack([values.sum() for values in tensors.values()])
        totals |= zip(tensors, found.tolist(), strict=True)
    return totals


def zeros(d_sae: int, n: int, name: str) -> NDArray[np.float64]:
    """[d_sae, n] zeros. Raises InputError where n is no whole number of 0 or more, or too large for the memory."""
    if not isinstance(n, (int, np.integer)) or n < 0:
        raise InputError(f"{name} must be a whole number of 0 or more, got {n!r}")
    try:
        return np.zeros((d_sae, n))
    except (MemoryError, ValueError) as error:
        raise InputError(f"{name} = {n} makes {d_sae} x {n} sums, too many for the memory: ask for fewer") from error


class Statistics:
    """Sums of features of one SAE; what ShiftStats and CorrelationStats have in common.

    An update that fails, or that Ctrl-C stops, adds nothing. Any number of threads may use one object: their updates
    are added one after the other, and a thread that reads gets the sums of whole updates. The order of updates is then
    up to chance, and float64 sums depend on it by rounding.

    An array that was read does not change with later updates. Objects can be copied and pickled.
    """

    _NAMES: ClassVar[tuple[str, ...]]

    sae: SAE | None
    sae_source: str
    sae_fingerprint: str

    _sums: Sums

    def __init__(self, sae: SAE | None, source: str, fingerprint: str, sums: Sums) -> None:
        self.sae, self.sae_source, self.sae_fingerprint, self._sums = sae, source, fingerprint, sums
        self._lock = Lock()

    @property
    def n_tokens(self) -> int:
        """Rows seen."""
        return self._sums.n_tokens

    def __radd__(self, other: Any) -> Any:
        """sum(several) begins with 0."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __repr__(self) -> str:
        of = f" of {self.sae_source}" if self.sae_source else ""
        return f"{type(self).__name__}({self.n_tokens:,} rows{of})"

    def _repr_html_(self) -> str:
        return f"<code>{html.escape(repr(self))}</code>"

    def __getattr__(self, name: str) -> Any:
        if name in self._NAMES:
            return self._sums[name]
        raise AttributeError(f"{type(self).__name__} has no '{name}'")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = Lock()

    def _sae_to_update(self) -> SAE:
        if self.sae is None:
            name = type(self).__name__
            raise InputError(f"these statistics were loaded without their SAE: give it to {name}.load to continue")
        return self.sae
