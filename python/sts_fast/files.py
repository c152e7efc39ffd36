"""Writes files and folders of results as a whole or not at all, and hashes the inputs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from sts_fast.errors import InputError, one_line

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# A JSON object, or a part of one, as it is written to a file or was read from one; its schema defines its content.
Document = dict[str, Any]

METADATA_KEY = "sts_fast"
LARGEST = 1e100  # no score or count is larger; squares and plots would overflow


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; renamed to `path` after success, removed after an error.

    Raises InputError where the file cannot be written (no such folder, no permission, disk full).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # it does not exist, or its parent is no folder
            temporary.unlink()


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A new, empty folder beside `path` to write to; replaces `path` after success, is removed after an error.

    Raises InputError where it cannot be written (no such folder, no permission, disk full).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_arrays(path: str | Path, arrays: dict[str, NDArray[np.generic]], metadata: dict[str, str]) -> None:
    """Writes numpy arrays and string metadata as one safetensors file. Raises InputError as `atomic_path`."""
    import numpy as np
    from safetensors.numpy import save

    # safetensors writes the memory as it is, regardless of the strides.
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    with atomic_path(path) as temporary:
        # One entry, because safetensors writes several in an order that changes from run to run.
        temporary.write_bytes(save(arrays, metadata={METADATA_KEY: json.dumps(metadata, sort_keys=True)}))


def load_arrays(path: str | Path, kind: str) -> tuple[dict[str, NDArray[np.generic]], dict[str, str]]:
    """Arrays and metadata of a file that `save_arrays` wrote with metadata['kind'] == kind.

    Raises InputError where the file is missing, damaged or of another kind.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            metadata = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
            if metadata.get("kind") != kind:
                raise InputError(f"{path} does not contain {kind}: give a file that it saved")
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}") from error
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not a readable safetensors file: {error}") from error


def read_json(path: Path) -> Document:
    """The object in a JSON file.

    Raises InputError where it cannot be read, is no object, or contains a NaN, an infinity or a number beyond 1e100.
    """
    try:
        document = json.loads(
            path.read_text(encoding="utf-8"), parse_constant=_number, parse_float=_number, parse_int=_whole_number
        )
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON: {one_line(error)}") from error
    if not isinstance(document, dict):
        raise InputError(f"{path} is not a JSON object")
    return document


def _number(text: str) -> float:
    value = float(text)
    if not abs(value) <= LARGEST:
        raise ValueError(f"it has a number beyond 1e100, {text}")
    return value


def _whole_number(text: str) -> int:
    _number(text)
    return int(text)


def sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def prepare_folder(folder: Path) -> None:
    """Makes sure that results can be written to `folder`, before any work is done. Raises InputError where not."""
    if folder == Path():
        raise InputError("results need their own folder: give one with --output")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the output folder {folder}: {error.strerror or error}") from error
    with atomic_path(folder / ".writable") as path:
        path.touch()
    (folder / ".writable").unlink()


def to_json(document: Mapping[str, Any]) -> str:
    """A document as JSON text: indented, and without NaN, which JSON does not have."""
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def load_schema(place: str) -> Document:
    """A JSON schema of the package, by its place in it, such as 'mix/mix.schema.json'."""
    schema: Document = json.loads(resources.files("sts_fast").joinpath(place).read_text(encoding="utf-8"))
    return schema


def check_document(document: Mapping[str, Any], schema: Document) -> None:
    """Raises jsonschema.ValidationError where what `to_json` makes of a document does not follow a schema."""
    import jsonschema

    jsonschema.Draft202012Validator(schema).validate(json.loads(to_json(document)))


class InputFile(TypedDict):
    """A file that a run was made from. role: 'train', 'domains', 'sae' and the like; sha256: in hexadecimal."""

    role: str
    path: str
    sha256: str


def hashed_inputs(role: str, paths: Iterable[str | Path]) -> list[InputFile]:
    """The record of input files.

    Of a folder of examples, all files in and below it are listed; of a folder of a model or SAE only those directly in
    it, because subfolders contain copies in other formats.
    """
    entries: list[InputFile] = []
    for path in map(Path, paths):
        entries_below = path.glob("*" if role in ("model", "tuned", "sae") else "**/*")
        for file in sorted(file for file in entries_below if file.is_file()) if path.is_dir() else [path]:
            entries.append({"role": role, "path": str(file), "sha256": sha256(file)})
    return entries
