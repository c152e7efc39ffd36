"""Files of named tensors: read in parts, never trusted."""

from __future__ import annotations

import io
import os
import pickle
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sts_fast.errors import InputError
from sts_fast.sae.checkpoint import BLOCK_BYTES, Checkpoint, Matrix

N, M = 300, 70


def values(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(N, M, generator=torch.Generator().manual_seed(0)).to(dtype)


def as_safetensors(path: Path, w: torch.Tensor) -> Path:
    save_file({"odd": torch.zeros(3, dtype=torch.int8), "w": w}, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


def as_pt(path: Path, w: torch.Tensor) -> Path:
    torch.save({"w": w}, path.with_suffix(".pt"))
    return path.with_suffix(".pt")


def as_npz(path: Path, w: torch.Tensor) -> Path:
    np.savez(path.with_suffix(".npz"), w=w.numpy())
    return path.with_suffix(".npz")


def as_packed_npz(path: Path, w: torch.Tensor) -> Path:
    np.savez_compressed(path.with_suffix(".npz"), w=w.numpy())
    return path.with_suffix(".npz")


FORMATS: dict[str, Callable[[Path, torch.Tensor], Path]] = {
    "safetensors": as_safetensors,
    "pt": as_pt,
    "npz": as_npz,
    "packed npz": as_packed_npz,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", FORMATS)
def test_parts_are_those_of_the_tensor(kind: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("sts_fast.sae.checkpoint.BLOCK_BYTES", 4 * M * 40)  # several blocks
    if "npz" in kind and dtype == torch.bfloat16:
        return  # numpy has none
    w = values(dtype)
    file = Checkpoint(FORMATS[kind](tmp_path / "a", w))
    assert file.shapes["w"] == (N, M)
    for transposed, expected in ((False, w), (True, w.T)):
        matrix = file.matrix("w", (None, None), transposed=transposed)
        assert matrix.shape == expected.shape
        held = matrix.whole()
        assert held.dtype == (dtype if dtype in (torch.float32, torch.bfloat16) else torch.float32)
        assert torch.equal(held, expected.to(held.dtype))
        assert torch.equal(matrix.whole("bfloat16"), expected.to(torch.bfloat16))
        chosen = [5, 0, 69, 5]
        assert torch.equal(matrix.rows(chosen), expected[chosen].float())
        norms = np.linalg.norm(expected.double().numpy(), axis=1)
        assert np.allclose(matrix.row_norms(), norms, rtol=1e-6)


def test_what_the_file_holds_is_mapped_not_copied(tmp_path: Path) -> None:
    w = torch.zeros(BLOCK_BYTES // 4 // 1000, 1000)
    for write in (as_safetensors, as_pt):
        path = write(tmp_path / "a", w)
        maps = Path("/proc/self/maps")
        if not maps.is_file():
            pytest.skip("tells mapped files by Linux's own means")
        held = Checkpoint(path).matrix("w", (None, None), transposed=True).whole()
        assert str(path) in maps.read_text()
        assert held.shape == w.T.shape
        del held
        assert str(path) not in maps.read_text()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_by_name(kind: str, bad: float, tmp_path: Path) -> None:
    w = values()
    w[-1, -1] = bad
    matrix = Checkpoint(FORMATS[kind](tmp_path / "a", w)).matrix("w", (N, M))
    for read in (Matrix.whole, Matrix.row_norms, lambda matrix: matrix.rows([0, N - 1])):
        with pytest.raises(InputError, match=r"a\.(safetensors|pt|npz): w contains NaN or infinity"):
            read(matrix)


# Damaged and hostile files --------------------------------------------------------------------------------------------


class Payload:
    """What a pickle may do to those who load it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def hostile_pt(folder: Path) -> Path:
    torch.save({"w": values(), "extra": Payload(folder / "executed")}, folder / "a.pt")
    return folder / "a.pt"


def plain_pickle(folder: Path) -> Path:
    (folder / "a.pt").write_bytes(pickle.dumps({"w": Payload(folder / "executed")}))
    return folder / "a.pt"


def legacy_pt(folder: Path) -> Path:
    torch.save({"w": values()}, folder / "a.pt", _use_new_zipfile_serialization=False)
    return folder / "a.pt"


def hostile_npz(folder: Path) -> Path:
    np.savez(folder / "a.npz", w=np.array([Payload(folder / "executed")], dtype=object))
    return folder / "a.npz"


def cut_off(write: Callable[[Path, torch.Tensor], Path]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = write(folder / "a", values())
        path.write_bytes(path.read_bytes()[:-2000])
        return path

    return make


def bomb(name: str) -> Callable[[Path], Path]:
    """A small file that unpacks to 200 MB."""

    def make(folder: Path) -> Path:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (50_000_000,)})
        with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as archive:
            for member in ("w.npy",) if name.endswith("npz") else ("a/data.pkl", "a/data/0"):
                archive.writestr(member, header.getvalue() + bytes(200_000_000))
        return folder / name

    return make


def npz_of_another_shape(folder: Path) -> Path:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (10**9, 10**9)})
    with zipfile.ZipFile(folder / "a.npz", "w") as archive:
        archive.writestr("w.npy", header.getvalue() + bytes(400))
    return folder / "a.npz"


def stretched_pt(folder: Path) -> Path:
    torch.save({"w": torch.zeros(1, 1).expand(100_000, 100_000)}, folder / "a.pt")
    return folder / "a.pt"


def safetensors_of_absurd_header(folder: Path) -> Path:
    (folder / "a.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    return folder / "a.safetensors"


def just(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def saved(name: str, what: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        torch.save(what, folder / name)
        return folder / name

    return make


def zip_of_many(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "a.npz", "w") as archive:
        for i in range(5000):
            archive.writestr(f"w{i}.npy", b"")
    return folder / "a.npz"


def safetensors_of_many(folder: Path) -> Path:
    save_file({f"w{i:0100}": torch.zeros(1) for i in range(7000)}, folder / "a.safetensors")
    return folder / "a.safetensors"


HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "pt with a payload": (hostile_pt, r"a\.pt would run code when loaded \(it calls \w+\.mkdir\), so it was not read"),
    "plain pickle": (plain_pickle, r"a\.pt would run code when loaded"),
    "pt before 1.6": (legacy_pt, r"a\.pt would run code when loaded .*save_file"),
    "npz of objects": (hostile_npz, r"a\.npz: w has dtype object"),
    "safetensors cut off": (cut_off(as_safetensors), r"a\.safetensors is not a readable safetensors file"),
    "pt cut off": (cut_off(as_pt), r"a\.pt is not a readable weights file"),
    "npz cut off": (cut_off(as_npz), r"a\.npz is not a readable weights file"),
    "bomb of npz": (bomb("a.npz"), r"a\.npz unpacks to \d+ bytes from \d+"),
    "bomb of pt": (bomb("a.pt"), r"a\.pt was compressed after PyTorch saved it"),
    "npz of another shape": (npz_of_another_shape, r"w claims shape \[1000000000, 1000000000\], but its data is"),
    "pt stretched": (stretched_pt, r"w claims shape \[100000, 100000\], more than the file holds"),
    "absurd header": (safetensors_of_absurd_header, "is not a readable safetensors file"),
    "zip of many": (zip_of_many, "has 5000 members, too many for a checkpoint of an SAE"),
    "safetensors of many": (safetensors_of_many, r"has a header of \d+ bytes: save the SAE's tensors alone"),
    "empty": (just("a.pt", b""), "is not a readable"),
    "empty npz": (just("a.npz", b""), "is not a readable"),
    "zip of nothing": (just("a.npz", b"PK\x05\x06" + bytes(18)), "is not a readable"),
    "text": (just("a.pt", b"hello, this is no checkpoint at all"), "is not a readable"),
    "pt of a tensor": (saved("a.pt", torch.zeros(3)), "holds a Tensor, not tensors by name"),
    "pt of a number": (saved("a.pt", 3), "holds a int, not tensors by name"),
    "pt of sparse tensors": (saved("a.pt", {"w": torch.eye(3).to_sparse()}), "w is not a plain tensor"),
    "npz of text": (lambda folder: np_saved(folder, np.array(["x"])), "w has dtype <U1"),
    "npz of dates": (lambda folder: np_saved(folder, np.array(["2020-01-01"], "M8[D]")), "w has dtype datetime64"),
    "npz of another byte order": (lambda folder: np_saved(folder, np.zeros(3, ">f4")), "w has dtype >f4"),
}


def np_saved(folder: Path, array: np.ndarray) -> Path:
    np.savez(folder / "a.npz", w=array)
    return folder / "a.npz"


@pytest.mark.parametrize("fault", HOSTILE)
def test_hostile_file_is_told_in_one_sentence(fault: str, tmp_path: Path) -> None:
    make, message = HOSTILE[fault]
    path = make(tmp_path)
    started = time.process_time()
    with pytest.raises(InputError, match=message) as e:
        Checkpoint(path).matrix("w", (None, None)).whole()
    assert time.process_time() - started < 1
    assert str(path) in str(e.value)
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 500
    assert not (tmp_path / "executed").exists()


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no file .*a\.pt"):
        Checkpoint(tmp_path / "a.pt")
