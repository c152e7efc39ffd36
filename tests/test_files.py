"""Files that are either whole or not there."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from safetensors.numpy import save_file

from sts_fast import files
from sts_fast.errors import InputError

KIND = {"kind": "Test", "note": "é"}
ARRAYS = {
    "doubles": np.linspace(0, 1, 7),
    "counts": np.array([1, 2**40], np.int64),
    "table": np.arange(6.0).reshape(2, 3),
    "column by column": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "every other": np.arange(10)[::2],
    "empty": np.zeros((3, 0)),
}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_written_whole_under_its_name(tmp_path: Path) -> None:
    path = tmp_path / "result.txt"
    path.write_text("old")
    with files.atomic_path(path) as temporary:
        temporary.write_text("new")
        assert temporary.parent == path.parent
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["result.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
def test_a_fault_half_way_leaves_what_was_there(error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "result.txt"
    path.write_text("old")

    def write_half() -> None:
        with files.atomic_path(path) as temporary:
            temporary.write_text("half of the n")
            raise error

    with pytest.raises(error):
        write_half()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["result.txt"]


def test_a_full_disk_is_told_in_one_sentence(tmp_path: Path) -> None:
    def write_half() -> None:
        with files.atomic_path(tmp_path / "result.txt") as temporary:
            temporary.write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(InputError, match=r"cannot write .*result\.txt: No space left on device$"):
        write_half()
    assert names(tmp_path) == []


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "missing" / "r.txt", tmp_path / "file" / "r.txt", tmp_path / "folder"):
        with pytest.raises(InputError, match="cannot write"), files.atomic_path(place) as temporary:
            temporary.write_text("x")
    assert names(tmp_path) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to the superuser")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(InputError, match=r"cannot write .*: Permission denied"):
        files.save_arrays(tmp_path / "a.safetensors", ARRAYS, KIND)
    tmp_path.chmod(stat.S_IRWXU)


def test_arrays_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    files.save_arrays(path, ARRAYS, KIND)
    arrays, metadata = files.load_arrays(path, "Test")
    assert metadata == KIND
    assert set(arrays) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert np.array_equal(arrays[name], array)
        assert arrays[name].dtype == array.dtype
        assert arrays[name].shape == array.shape
        arrays[name][...] = 0  # they are the caller's, who goes on adding to them
    assert names(tmp_path) == ["a.safetensors"]


def test_files_that_are_not_what_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(InputError, match=r"there is no file .*a\.safetensors"):
        files.load_arrays(path, "Test")
    save_file({"doubles": np.zeros(1)}, path)
    with pytest.raises(InputError, match=r"a\.safetensors does not contain Test"):
        files.load_arrays(path, "Test")
    files.save_arrays(path, ARRAYS, {"kind": "Other"})
    with pytest.raises(InputError, match=r"a\.safetensors does not contain Test"):
        files.load_arrays(path, "Test")
    whole = path.read_bytes()
    for damaged in (b"", b"x", whole[:-1], whole[: len(whole) // 2], b"\0" * 500, whole[8:]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"a\.safetensors is not a readable safetensors file") as e:
            files.load_arrays(path, "Other")
        assert "\n" not in str(e.value)
    with pytest.raises(InputError):
        files.load_arrays(tmp_path, "Test")


def test_sha256(tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes(300_000)
    (tmp_path / "f").write_bytes(content)
    assert files.sha256(tmp_path / "f") == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    "place",
    [
        "forecast/scores.schema.json",
        "forecast/trace.schema.json",
        "mix/mix.schema.json",
        "ablate/ablation.schema.json",
        "outcomes/calibration/calibration.schema.json",
    ],
)
def test_schemas_are_valid_and_refuse_an_empty_document(place: str) -> None:
    schema = files.load_schema(place)
    jsonschema.Draft202012Validator.check_schema(schema)
    with pytest.raises(jsonschema.ValidationError):
        files.check_document({}, schema)


def test_documents_are_checked_as_they_are_written() -> None:
    schema = {"properties": {"ci": {"type": "array"}}}
    files.check_document({"ci": (1.0, 2.0)}, schema)
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.check_document({"ci": [float("nan")]}, schema)
