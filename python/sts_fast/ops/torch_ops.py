"""The ops as torch operators, sts_fast::accumulate_shift and so on, for torch.compile and export.

    handle = sts_fast.torch_handle(sae)
    torch.ops.sts_fast.accumulate_shift(handle, base, other, sum_sq_shift)

Arguments are tensors, on the CPU or all on one device; accumulators are added to in place (on the CPU for a device
without float64, such as a Mac's).

    accumulate_shift(sae, base, other, sum_sq_shift, sum_base=None, sum_other=None, sum_sq_base=None,
                     sum_sq_other=None, n_fired_base=None, n_fired_other=None, columns=None, row_weights=None,
                     weighted_sq_shift=None)
    accumulate_moments(sae, acts, sum_h, sum_sq_h, n_fired, targets=None, sum_hy=None, columns=None)
    encode_sparse(sae, acts, columns=None) -> indptr, indices, values

Shapes and dtypes are those of ShiftStats, CorrelationStats and encode, but row_weights and targets are float64;
columns [n_columns] int64 lie on the CPU. A call that Ctrl-C stops has changed its accumulators in part.
"""

from __future__ import annotations

from functools import cache
from itertools import count
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakValueDictionary

from sts_fast.ops import backend
from sts_fast.sae import SAE
from sts_fast.sae.rows import rows

if TYPE_CHECKING:
    import torch

_SHIFT = """accumulate_shift(int sae, Tensor base, Tensor other, Tensor(a!) sum_sq_shift, Tensor(b!)? sum_base=None,
    Tensor(c!)? sum_other=None, Tensor(d!)? sum_sq_base=None, Tensor(e!)? sum_sq_other=None,
    Tensor(f!)? n_fired_base=None, Tensor(g!)? n_fired_other=None, Tensor? columns=None, Tensor? row_weights=None,
    Tensor(h!)? weighted_sq_shift=None) -> ()"""
_MOMENTS = """accumulate_moments(int sae, Tensor acts, Tensor(a!) sum_h, Tensor(b!) sum_sq_h, Tensor(c!) n_fired,
    Tensor? targets=None, Tensor(d!)? sum_hy=None, Tensor? columns=None) -> ()"""
_ENCODE = "encode_sparse(int sae, Tensor acts, Tensor? columns=None) -> (Tensor, Tensor, Tensor)"

_numbers = count(1)
_handles: WeakKeyDictionary[SAE, int] = WeakKeyDictionary()
_saes: WeakValueDictionary[int, SAE] = WeakValueDictionary()


def torch_handle(sae: SAE) -> int:
    """The number of an SAE for torch.ops.sts_fast, which are defined at the first call.

    The number is valid as long as the SAE exists. encode_sparse in a function compiled as a whole needs torch 2.10.
    """
    _define()
    if sae not in _handles:
        number = next(_numbers)
        _handles[sae], _saes[number] = number, sae
    return _handles[sae]


@cache
def _define() -> None:
    import torch

    for schema, function in ((_SHIFT, _shift), (_MOMENTS, _moments), (_ENCODE, _encode)):
        name = f"sts_fast::{schema.partition('(')[0]}"
        torch.library.define(name, schema[schema.index("(") :].replace("\n", ""))
        torch.library.impl(name, ("cpu", "cuda", "xpu", "mps"), function)
        torch.library.register_fake(name, _encode_fake if function is _encode else lambda *_, **__: None)


def _backend(handle: int, acts: torch.Tensor) -> tuple[Any, Any, Any]:
    """(ops, encoder, conversion of their other arguments)."""
    sae = _saes.get(handle)
    if sae is None:
        raise ValueError(f"sae {handle} is not a number of torch_handle, or its SAE no longer exists")
    ops, encoder, sums_on = backend.of(sae, acts)
    if sums_on is not None:
        return ops, encoder, lambda tensor: tensor
    return ops, encoder, lambda tensor: None if tensor is None else tensor.numpy()


def _columns(columns: torch.Tensor | None) -> Any:
    return None if columns is None else columns.cpu().numpy()


def _shift(sae: int, base: Any, other: Any, sum_sq_shift: Any, *optional: Any, **named: Any) -> None:
    names = ("sum_base", "sum_other", "sum_sq_base", "sum_sq_other", "n_fired_base", "n_fired_other")
    given = dict(zip((*names, "columns", "row_weights", "weighted_sq_shift"), optional, strict=False)) | named
    columns = _columns(given.pop("columns", None))
    ops, encoder, taken = _backend(sae, base)
    given = {name: taken(tensor) for name, tensor in given.items()}
    base, other = rows(base, encoder.d_in, "base"), rows(other, encoder.d_in, "other")
    ops.accumulate_shift(encoder, base, other, columns=columns, sum_sq_shift=taken(sum_sq_shift), **given)


def _moments(
    sae: int, acts: Any, sum_h: Any, sum_sq_h: Any, n_fired: Any, targets: Any = None, sum_hy: Any = None,
    columns: Any = None,
) -> None:  # fmt: skip
    ops, encoder, taken = _backend(sae, acts)
    sums = {"sum_h": sum_h, "sum_sq_h": sum_sq_h, "n_fired": n_fired, "sum_hy": sum_hy}
    given = {name: taken(tensor) for name, tensor in sums.items()}
    ops.accumulate_moments(encoder, rows(acts, encoder.d_in), taken(targets), columns=_columns(columns), **given)


def _encode(sae: int, acts: Any, columns: Any = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    import torch

    ops, encoder, _ = _backend(sae, acts)
    found = ops.encode_sparse(encoder, rows(acts, encoder.d_in), _columns(columns))
    indptr, indices, values = (torch.as_tensor(part) for part in found)
    return indptr, indices, values


def _encode_fake(sae: int, acts: Any, columns: Any = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    import torch

    n = torch.library.get_ctx().new_dynamic_size()
    n_tokens = acts.shape[0] if acts.ndim == 2 else acts.numel() // _saes[sae].d_in
    return (
        acts.new_empty(n_tokens + 1, dtype=torch.int64),
        acts.new_empty(n, dtype=torch.int32),
        acts.new_empty(n, dtype=torch.float32),
    )
