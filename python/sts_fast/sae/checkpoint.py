"""Named tensors in a file, read in parts: safetensors, PyTorch's .pt and NumPy's .npz.

Nothing is ever unpickled beyond PyTorch's weights_only, and only requested tensors stay in memory. A file is mapped
afresh for every read and the map dropped after it, which keeps the process small.
"""

from __future__ import annotations

import math
import os
import re
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from sts_fast.errors import InputError
from sts_fast.sae.config import Config, not_understood

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from sts_fast.statistics import Floats

BLOCK_BYTES = 8 << 20
# Names and shapes fill a file's table of contents to a few kB, and its list of members to a few.
CONTENTS_BYTES = 1 << 20
MOST_MEMBERS = 1000
# Weights hardly compress: a file that unpacks to more than this many times its size is a bomb.
MOST_UNPACKED = 20
FREE_UNPACKED_BYTES = 64 << 20
# Tensors that say how training went: when and how often features fired, steps, and the width of its pseudo-gradient.
OF_TRAINING = re.compile(
    r"stats_last_nonzero|latents_activation_frequency|latents_mean_square|act_freq\w*|(log_)?(feature_)?sparsity"
    r"|\w+_since_(fired|active|activation)|\w+_not_active|(num|n)_\w+|steps?|bandwidth"
)


class Checkpoint:
    """The tensors of one file by name, or of memory (`of_memory`).

    path:   the file
    shapes: shape by name
    dtypes: 'float32', 'bfloat16', ... by name
    values: everything else at the top of a .pt file, such as numbers, texts and dicts of them

    Raises InputError, naming the file, where it is missing, damaged, of another size than it claims, or would run
    pickled code.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read: set[str] = set()
        tensors, values = self._open()
        self.values = Config(path, values)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}

    @classmethod
    def of_memory(cls, name: str, tensors: dict[str, torch.Tensor]) -> Checkpoint:
        """Tensors that another library has loaded already; messages call them `name`."""

        class InMemory(cls):  # type: ignore[misc, valid-type]
            def _open(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
                return tensors, {}

        return InMemory(Path(name))

    def mapped(self, name: str) -> torch.Tensor:
        """The tensor as stored, mapped afresh: its pages are read when touched, and freed with the tensor."""
        tensor = self._open()[0][self._existing(name)]
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
            raise InputError(
                f"{self.path}: {name} has dtype {self.dtypes[name]}, but float32, bfloat16 or float16 is needed"
            )
        return tensor

    def vector(self, name: str, length: int, *, or_number: bool = False) -> Floats:
        """[length] float32, a copy; or_number: a single number is repeated `length` times."""
        shape = self.shapes[self._existing(name)]
        is_number = or_number and shape in ((), (1,))
        if not is_number and shape != (length,):
            raise InputError(f"{self.path}: {name} has shape {list(shape)}, but [{length}] is needed")
        values = np.array(self.mapped(name).float().numpy(), np.float32).reshape(-1)
        if not np.isfinite(values).all():
            raise InputError(_not_finite(self.path, name))
        return np.repeat(values, length) if is_number else values

    def exponential(self, name: str, length: int) -> Floats:
        """[length] float32 exponentials of a vector."""
        with np.errstate(over="ignore"):
            values: Floats = np.exp(self.vector(name, length))
        if not np.isfinite(values).all():
            raise InputError(f"{self.path}: exp({name}) is infinite: copy or download it again")
        return values

    def number(self, name: str) -> float:
        """The value of a tensor of one element, of any dtype."""
        tensor = self._open()[0][self._existing(name)]
        if tensor.numel() != 1:
            raise InputError(f"{self.path}: {name} has shape {list(tensor.shape)}, but one number is needed")
        value = float(tensor)
        if not math.isfinite(value):
            raise InputError(f"{self.path}: {name} is NaN or infinity: copy or download it again")
        return value

    def matrix(self, name: str, shape: tuple[int | None, int | None], *, transposed: bool = False) -> Matrix:
        """A view of the matrix, or of its transpose.

        shape: required shape of the view; None allows any width
        """
        stored = self.shapes[self._existing(name)]
        needed = shape[::-1] if transposed else shape
        if len(stored) != 2 or 0 in stored or any(n not in (None, m) for n, m in zip(needed, stored, strict=True)):
            text = ", ".join("any" if n is None else str(n) for n in needed)
            raise InputError(f"{self.path}: {name} has shape {list(stored)}, but [{text}] is needed")
        self.mapped(name)  # raises InputError for dtypes other than those of weights
        return Matrix(self, name, transposed)

    def refuse_unread(self, *ignored: str) -> None:
        """Raises InputError for tensors and values that were never read, by name: they may change the features.

        ignored: names of tensors that cannot change the features of this layout
        """
        left = self.shapes.keys() - self._read - {*ignored}
        left = {name for name in left if not OF_TRAINING.fullmatch(name)}
        if left:
            raise InputError(not_understood(self.path, sorted(left), "tensor"))
        self.values.refuse_unread()

    def _existing(self, name: str) -> str:
        self._read.add(name)
        if name not in self.shapes:
            names = ", ".join(sorted(self.shapes)[:12]) or "none"
            raise InputError(f"{self.path} has no tensor '{name}', which its layout needs (it has {names})")
        return name

    def _open(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        kind = "weights"
        try:
            with open(self.path, "rb") as file:
                start = file.read(8)
                if start.startswith(b"PK\x03\x04") and self.path.suffix != ".safetensors":
                    names = _checked_members(self.path, file)
                    kind = ".npz" if all(name.endswith(".npy") for name in names) else "PyTorch"
                    return (_npz(self.path, file), {}) if kind == ".npz" else _torch(self.path)
                if start.startswith(b"\x80") and self.path.suffix != ".safetensors":
                    raise InputError(_needs_code(self.path, "it was pickled before PyTorch 1.6"))
            kind = "safetensors"
            header = int.from_bytes(start, "little")
            if CONTENTS_BYTES < header < self.path.stat().st_size:
                raise InputError(f"{self.path} has a header of {header} bytes: save the SAE's tensors alone")
            return _safetensors(self.path), {}
        except InputError:
            raise
        except FileNotFoundError as error:
            raise InputError(f"there is no file {self.path}") from error
        except Exception as error:  # a damaged or hostile file can make the libraries raise anything
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            raise InputError(
                f"{self.path} is not a readable {kind} file ({reason}): copy or download it again"
            ) from error


@dataclass(frozen=True)
class Matrix:
    """A matrix in a file, read by rows.

    transposed: the file contains its transpose, as torch's Linear layers do
    """

    file: Checkpoint
    name: str
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        n, m = self.file.shapes[self.name]
        return (m, n) if self.transposed else (n, m)

    @cached_property
    def dtype(self) -> str:
        """Dtype in memory by default, 'float32' or 'bfloat16'."""
        stored = self.file.dtypes[self.name]
        return stored if stored in ("float32", "bfloat16") else "float32"

    def whole(self, dtype: str | None = None) -> torch.Tensor:
        """The whole matrix, checked for NaN and infinity; memory-mapped where the file has this dtype, else converted.

        Raises InputError where it is not finite, naming file and tensor.
        """
        import torch

        wanted = getattr(torch, dtype or self.dtype)
        stored = self._stored()
        dense = stored.is_contiguous() or stored.T.is_contiguous()
        # The core reads contiguous rows or columns, at addresses of whole floats.
        if stored.dtype == wanted and dense and stored.data_ptr() % 4 == 0:
            for _ in self._blocks():
                pass
        else:
            stored = torch.empty(stored.shape, dtype=wanted)
            for rows, block in self._blocks():
                stored[rows] = block.to(wanted)
        return stored.T if self.transposed else stored

    def rows(self, indices: Sequence[int] | NDArray[np.integer[Any]]) -> torch.Tensor:
        """[n_indices, n_columns] float32, a copy; nothing else of the matrix stays in memory."""
        import torch

        chosen = torch.as_tensor(np.asarray(indices, np.int64))
        if not self.transposed:
            rows_read = self._stored()[chosen].float()
            if not bool(rows_read.sum(dtype=torch.float64).isfinite()):
                raise InputError(_not_finite(self.file.path, self.name))
            return rows_read
        # Every stored row contains one number of each wanted row: read the file a block at a time.
        rows_read = torch.empty(len(chosen), self.shape[1])
        for rows, block in self._blocks():
            rows_read[:, rows] = block[:, chosen].float().T
        return rows_read

    def row_norms(self) -> Floats:
        """[n_rows] float32 Euclidean norms, read a block at a time."""
        import torch

        squares = torch.zeros(self.shape[0], dtype=torch.float64)
        for rows, block in self._blocks():
            if self.transposed:
                squares += block.double().square_().sum(dim=0)
            else:
                squares[rows] = torch.linalg.vector_norm(block, dim=1, dtype=torch.float64).square()
        norms: Floats = squares.sqrt().float().numpy()
        return norms

    def _stored(self) -> torch.Tensor:
        return self.file.mapped(self.name)

    def _blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Blocks of stored rows, each through its own map; raises InputError where a number is not finite."""
        import torch

        n, m = self.file.shapes[self.name]
        step = max(1, BLOCK_BYTES // (4 * m))
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            block = self._stored()[rows]
            # One pass, without a copy: a float64 sum of smaller floats cannot overflow, and keeps every NaN.
            total = (block.float() if block.dtype == torch.float64 else block).sum(dtype=torch.float64)
            if not bool(total.isfinite()):
                raise InputError(_not_finite(self.file.path, self.name))
            yield rows, block


def _not_finite(path: Path, name: str) -> str:
    return f"{path}: {name} contains NaN or infinity: copy or download it again"


def _safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _torch(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about storages written by older versions
        try:
            loaded = torch.load(os.fspath(path), map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            if "weights_only" in str(error).lower() or "weights only" in str(error).lower():
                raise InputError(_needs_code(path, _unsupported(str(error)))) from error
            raise
    if not isinstance(loaded, dict):
        raise InputError(f"{path} holds a {type(loaded).__name__}, not tensors by name: save its state_dict()")
    size = path.stat().st_size
    nested = [value for value in loaded.values() if isinstance(value, dict) and _tensors_in(value)]
    state = loaded if _tensors_in(loaded) or len(nested) != 1 else nested[0]
    tensors = _tensors_in(state)
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise InputError(f"{path}: {name} is not a plain tensor: save it as a dense one")
        if tensor.numel() * tensor.element_size() > size:
            raise InputError(f"{path}: {name} claims shape {list(tensor.shape)}, more than the file holds")
    values = {key: value for some in (loaded, state) for key, value in some.items() if value is not state}
    return tensors, {key: value for key, value in values.items() if isinstance(key, str) and key not in tensors}


def _tensors_in(values: dict[Any, Any]) -> dict[str, torch.Tensor]:
    import torch

    return {
        key: value.detach() for key, value in values.items() if isinstance(key, str) and isinstance(value, torch.Tensor)
    }


def _npz(path: Path, file: BinaryIO) -> dict[str, torch.Tensor]:
    """Tensors of a .npz archive: uncompressed members are mapped, the others unpacked."""
    import torch

    tensors = {}
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            with archive.open(info) as member:
                shape, is_fortran, dtype = _npy_header(member)
                header = member.tell()
            if dtype.kind not in "fiu" or not dtype.isnative:
                raise InputError(f"{path}: {name} has dtype {dtype}, but numbers of this machine's kind are needed")
            n_bytes = dtype.itemsize * int(np.prod([int(n) for n in shape], dtype=object))
            if header + n_bytes != info.file_size:
                raise InputError(f"{path}: {name} claims shape {list(shape)}, but its data is of another size")
            if info.compress_type == zipfile.ZIP_STORED and n_bytes:
                file.seek(info.header_offset + 26)
                lengths = np.frombuffer(file.read(4), "<u2")
                start = info.header_offset + 30 + int(lengths.sum()) + header
                array: Any = np.memmap(path, dtype, "c", start, shape, "F" if is_fortran else "C")
            else:
                with archive.open(info) as member:
                    array = np.lib.format.read_array(member, allow_pickle=False)
            tensors[name] = torch.from_numpy(array)
    return tensors


def _npy_header(member: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(member)


def _checked_members(path: Path, file: BinaryIO) -> list[str]:
    """Names of a zip archive's members; raises InputError where its sizes are those of a bomb, not of weights."""
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
    if len(members) > MOST_MEMBERS:
        raise InputError(f"{path} has {len(members)} members, too many for a checkpoint of an SAE: it was not read")
    size = path.stat().st_size
    is_packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
    if is_packed and any(member.filename.endswith("data.pkl") for member in members):
        raise InputError(f"{path} was compressed after PyTorch saved it: unpack it, and zip it without compression")
    most = MOST_UNPACKED * size + FREE_UNPACKED_BYTES if is_packed else size
    unpacked = sum(member.file_size for member in members)
    if unpacked > most:
        raise InputError(f"{path} unpacks to {unpacked} bytes from {size}, too many for weights: it was not read")
    for member in members:
        if member.flag_bits & 1:
            raise InputError(f"{path} is encrypted: save it without a password")
        if member.filename.endswith("data.pkl") and member.file_size > CONTENTS_BYTES:
            raise InputError(f"{path}: its table of contents has {member.file_size} bytes: save its tensors alone")
    return [member.filename for member in members]


def _unsupported(error: str) -> str:
    """Name of the function that a pickle would call, from PyTorch's explanation."""
    match = re.search(r"GLOBAL ([\w.]+)", error)
    return f"it calls {match[1]}" if match else "it contains more than tensors"


def _needs_code(path: Path, reason: str) -> str:
    return (
        f"{path} would run code when loaded ({reason}), so it was not read: if you trust it, load it and save its "
        "tensors with safetensors.torch.save_file"
    )
