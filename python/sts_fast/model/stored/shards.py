"""Files with the rows of captured prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sts_fast import files
from sts_fast.errors import InputError
from sts_fast.model.reader import PairedRows
from sts_fast.model.stored.index import damaged

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray


def write_shard(path: Path, batches: Sequence[Sequence[PairedRows]], dtype: str) -> str:
    """Writes the rows of some batches, each with one PairedRows per hook; returns the SHA-256 of the file."""
    import torch
    from safetensors.torch import save

    tensors: dict[str, torch.Tensor] = {}
    for i, of_hook in enumerate(zip(*batches, strict=True)):
        for name, rows in (("base", [batch.base for batch in of_hook]), ("demos", [batch.demos for batch in of_hook])):
            tensors[f"{name}.{i}"] = torch.cat([part.cpu().to(getattr(torch, dtype)) for part in rows])
        for name, kept in (
            ("kept", [mask for batch in of_hook for mask in batch.kept]),
            ("kept_paired", [mask for batch in of_hook for mask in batch.kept_paired]),
        ):
            tensors[f"{name}.{i}"] = torch.from_numpy(np.concatenate(kept))
    content = save(tensors)
    with files.atomic_path(path) as temporary:
        temporary.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def load_tensors(path: Path, names: Sequence[str]) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in names}
    except FileNotFoundError as error:
        raise InputError(f"there is no shard {path}: run the same sts-fast capture again to write it") from error
    except (SafetensorError, OSError) as error:
        raise damaged(path, str(error)) from error


def mask_of(
    path: Path, name: str, tensors: Mapping[str, torch.Tensor], lengths: Sequence[int]
) -> list[NDArray[np.bool_]]:
    """Splits a stored [sum(lengths)] bool tensor into one mask per prompt."""
    import torch

    mask = tensors[name]
    if mask.dtype != torch.bool or mask.shape != (sum(lengths),):
        raise damaged(path, f"{name} is {_form(mask)}, not [{sum(lengths)}] bool")
    return np.split(mask.numpy(), np.cumsum(lengths)[:-1])


def check_rows(path: Path, name: str, rows: torch.Tensor, n_tokens: int, d_in: int) -> None:
    import torch

    # Floats of 8 bits have a scale, which the file does not contain.
    if not rows.is_floating_point() or rows.itemsize == 1 or rows.shape != (n_tokens, d_in):
        raise damaged(path, f"{name} is {_form(rows)}, not [{n_tokens}, {d_in}] of float32, bfloat16 or float16")
    finite = torch.isfinite(rows)
    if not bool(finite.all()):
        row, column = (int(i) for i in (~finite).nonzero()[0])
        raise damaged(path, f"{name} contains NaN or infinity at row {row}, column {column}")


def _form(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
