"""Writes files and folders of results as a whole or not at all, and hashes the inputs."""

from __future__ import annotations

import ctypes
import errno
import glob
import hashlib
import itertools
import json
import os
import secrets
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from sts_fast.errors import InputError, one_line

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# A JSON object, or a part of one, as it is written to a file or was read from one; its schema defines its content.
Document = dict[str, Any]

METADATA_KEY = "sts_fast"
KEPT, KEY_DIGITS = "kept", 16  # kind of a kept file, and digits of its key in its name
RESULTS_FILE = "run.yaml"  # what a folder of results was made with
LARGEST = 1e100  # no score or count is larger; squares and plots would overflow


def caches() -> Path:
    """The folder for what can be made again at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sts-fast"


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; renamed to `path` after success, removed after an error.

    Raises InputError where the file cannot be written (no such folder, no permission, disk full).
    """
    path = Path(path)
    try:
        with _claimed(path, path.parent) as temporary:
            yield temporary
            os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A new, empty folder beside `path` to write to; takes its place after success, is removed after an error.

    Raises InputError where it cannot be written (no such folder, no permission, disk full).
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _recover(path)
        with _claimed(path, path.parent, folder=True) as temporary:
            yield temporary
            _put_in_place(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


@dataclass
class Results:
    """A folder of results: `folder` to write to, and `path`, its place, where it lies once it is whole and `placed`."""

    folder: Path
    path: Path
    placed: bool = False


@contextmanager
def results(output: str | Path, *, overwrite: bool = False) -> Iterator[Results]:
    """A new folder of results, put in place as a whole after success, and removed after an error.

    Its place is `output`, unless results lie there already: then the next free name, `output-2`, or with `overwrite`
    `output`, whose results are then gone. Whoever writes to the folder puts a RESULTS_FILE into it, to know it by.

    Raises InputError where `output` holds anything else, or cannot be written.
    """
    output = Path(output)
    if output.is_symlink():
        output = Path(os.path.realpath(output))
    if output == Path():
        raise InputError("results need their own folder: give one with --output")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _recover(output)
        if taken := _is_taken(output):
            if not (output / RESULTS_FILE).is_file():
                raise InputError(f"{output} holds something that sts-fast did not write: give another --output")
            if not overwrite and os.path.ismount(output):
                raise InputError(
                    f"{output} is a mounted folder that holds results: give --overwrite, or a folder below it"
                )
        with _claimed(output, _home(output), folder=True) as temporary:
            found = Results(temporary, _next_free(output) if taken and not overwrite else output)
            yield found
            while not _took_place(temporary, found.path, overwrite=overwrite):
                found.path = _next_free(output)
            found.placed = True
    except OSError as error:
        raise InputError(f"cannot write {output}: {error.strerror or error}") from error


def _took_place(temporary: Path, path: Path, *, overwrite: bool) -> bool:
    """Puts a folder in place; returns False where something lies there that is not to be replaced."""
    there = _held(path) if path.is_dir() else []
    is_file = os.path.lexists(path) and not path.is_dir()
    if is_file or (there and not (overwrite and (path / RESULTS_FILE).is_file())):
        return False  # another process was faster
    try:
        if temporary.parent != path:
            _put_in_place(temporary, path)
            return True
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EBUSY, errno.EXDEV, errno.EINVAL):
            raise
    # A mounted folder can be neither renamed nor replaced: it is filled.
    for child in there:
        _remove(child)
    for child in sorted(temporary.iterdir()):
        shutil.move(child, path / child.name)
    return True


@contextmanager
def kept(folder: Path) -> Iterator[Path]:
    """A folder for what a run has read so far: left after an error, removed after success unless another run uses it.

    Raises InputError where it cannot be made.
    """
    try:
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW) if fcntl is not None else -1
            if fcntl is None:
                break
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_SH)
            with suppress(FileNotFoundError):
                if os.stat(folder).st_ino == os.fstat(descriptor).st_ino:
                    break
            os.close(descriptor)  # another run was done with it in between
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}") from error
    try:
        yield folder
        with suppress(OSError):
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(folder)
    finally:
        with suppress(OSError):
            folder.rmdir()  # of a run that read nothing
        if fcntl is not None:
            os.close(descriptor)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Waits until no other process is in here with the same file; where the file system has no locks, it does not."""
    descriptor = os.open(path, os.O_RDWR) if fcntl is not None else -1
    try:
        if fcntl is not None:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        if fcntl is not None:
            os.close(descriptor)


def hidden(path: Path, ending: str) -> Path:
    """The name of what belongs to a folder until that is whole, such as `.run.kept` for `run`."""
    return _home(path) / f".{path.name}.{ending}"


def _home(path: Path) -> Path:
    """Where hidden names of a folder are: beside it, or in it where that may not be, as above a container's volume."""
    return path if path.is_dir() and not os.access(path.parent, os.W_OK) else path.parent


def _held(folder: Path) -> list[Path]:
    """What is in a folder, but for hidden names of its own."""
    return [child for child in folder.iterdir() if not child.name.startswith(f".{folder.name}.")]


def _is_taken(path: Path) -> bool:
    return bool(_held(path)) if path.is_dir() else os.path.lexists(path)


def _next_free(output: Path) -> Path:
    names = (output.with_name(f"{output.name}-{number}") for number in itertools.count(2))
    return next(path for path in names if not _is_taken(path))


@contextmanager
def _claimed(path: Path, home: Path, *, folder: bool = False) -> Iterator[Path]:
    """A new file or folder in `home` to become `path`, under a name that cannot be foretold, and not a link.

    It is locked while its process lives, so that what killed processes left behind is known, and removed first.
    """
    with suppress(OSError):
        for left in home.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 16}.tmp"):
            _remove_if_left(left)
    while True:
        temporary = home / f".{path.name}.{secrets.token_hex(8)}.tmp"
        if folder:
            temporary.mkdir()
        if fcntl is None:
            if not folder:
                temporary.touch(exist_ok=False)
            break
        try:
            descriptor = os.open(temporary, os.O_RDONLY if folder else os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileNotFoundError:
            if folder:
                continue  # another process took it for one that was left behind, before it was locked
            raise
        if _locks(descriptor) and temporary.exists():
            break
        os.close(descriptor)  # another process took it for one that was left behind
    try:
        yield temporary
    finally:
        _remove(temporary)
        if fcntl is not None:
            os.close(descriptor)


def _locks(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)  # a file system without locks
    return True


def _remove_if_left(temporary: Path) -> None:
    if fcntl is None:
        return
    with suppress(OSError):
        descriptor = os.open(temporary, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(temporary)
        finally:
            os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _put_in_place(temporary: Path, path: Path) -> None:
    """Renames a folder to `path`; one that is there lies under the temporary name then, or is gone."""
    if not path.is_dir() or not any(path.iterdir()):
        try:
            os.replace(temporary, path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            _put_in_place(temporary, path)  # another process was faster
    elif not _exchanged(temporary, path):
        aside = _aside(path)
        os.replace(path, aside)
        os.replace(temporary, path)
        _remove(aside)


def _aside(path: Path) -> Path:
    """The name of a folder while another one takes its place, where the system cannot exchange two names."""
    return path.with_name(f".{path.name}.earlier")


def _recover(path: Path) -> None:
    """Puts a folder back whose process was killed while another one took its place."""
    if not os.path.lexists(_aside(path)):
        return
    if os.path.lexists(path):
        _remove(_aside(path))
    else:
        os.replace(_aside(path), path)


def _exchanged(first: Path, second: Path) -> bool:
    """Exchanges two names in one step; False where the system, or the file system, cannot."""
    libc = None if sys.platform == "win32" else ctypes.CDLL(None)
    names = os.fsencode(first), os.fsencode(second)
    if (renameat2 := getattr(libc, "renameat2", None)) is not None:  # Linux; -100 is AT_FDCWD, 2 RENAME_EXCHANGE
        return bool(renameat2(-100, names[0], -100, names[1], 2) == 0)
    if (renamex_np := getattr(libc, "renamex_np", None)) is not None:  # macOS; 2 is RENAME_SWAP
        return bool(renamex_np(*names, 2) == 0)
    return False


def save_arrays(path: str | Path, arrays: dict[str, NDArray[np.generic]], metadata: dict[str, str]) -> None:
    """Writes numpy arrays and string metadata as one safetensors file. Raises InputError as `atomic_path`."""
    import numpy as np
    from safetensors.numpy import save

    # safetensors writes the memory as it is, regardless of the strides.
    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
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
            if not isinstance(metadata, dict) or metadata.get("kind") != kind:
                raise InputError(f"{path} does not contain {kind}: give a file that it saved")
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}") from error
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not a readable safetensors file: {error}") from error


@dataclass(frozen=True)
class Kept:
    """Arrays that a run has computed, a file each, so that it goes on from them after an interruption.

    folder: where they lie, see `kept`; None keeps nothing
    say:    receives a line where a file is damaged, or cannot be written
    origin: digest of what everything here was computed from
    """

    folder: Path | None = None
    say: Callable[[str], None] | None = None
    origin: str = ""

    def of(self, *parts: Any) -> Kept:
        """The same for what is computed from some `parts` too; see digest."""
        return self if self.folder is None else replace(self, origin=digest(self.origin, *parts))

    def arrays(
        self, name: str, parts: Sequence[Any], make: Callable[[], dict[str, NDArray[Any]]]
    ) -> dict[str, NDArray[Any]]:
        """What `make` returns: as it was kept, if it was made of the same parts here before, and else made and kept.

        name: what it is, in the plural
        """
        if self.folder is None:
            return make()
        key = digest(self.origin, name, *parts)
        path = self.folder / f"{name}-{key[:KEY_DIGITS]}.safetensors"
        if path.exists():
            with suppress(InputError):
                arrays, metadata = load_arrays(path, KEPT)
                if (metadata.get("key"), metadata.get("sha256")) == (key, digest(arrays)):
                    return arrays
            self._tell(f"{path} is damaged: it is made again")
        arrays = make()
        try:
            save_arrays(path, arrays, {"kind": KEPT, "key": key, "sha256": digest(arrays)})
        except InputError as error:
            self._tell(f"warning: {error}, so that it is not kept")
        return arrays

    def counts(self) -> dict[str, int]:
        """Number of files by the name of what they are."""
        paths = [] if self.folder is None else sorted(self.folder.glob(f"*-{'[0-9a-f]' * KEY_DIGITS}.safetensors"))
        return dict(Counter(path.name.rpartition("-")[0] for path in paths))

    def _tell(self, line: str) -> None:
        if self.say is not None:
            self.say(line)


NOTHING_KEPT = Kept()


def digest(*parts: Any) -> str:
    """SHA-256, in hexadecimal, of values, numpy arrays and dataclasses, and of sequences and mappings of these."""
    sha256 = hashlib.sha256()
    _digest(sha256, parts)
    return sha256.hexdigest()


def _digest(sha256: hashlib._Hash, part: Any) -> None:
    import numpy as np

    if isinstance(part, np.ndarray):
        sha256.update(f"array {part.dtype.str} {part.shape}\n".encode())
        sha256.update(np.ascontiguousarray(part).data)
        return
    if is_dataclass(part):
        part = type(part).__name__, {field.name: getattr(part, field.name) for field in fields(part)}
    if isinstance(part, Mapping):
        part = sorted(part.items())
    if isinstance(part, (list, tuple)):
        sha256.update(f"{len(part)} parts\n".encode())
        for element in part:
            _digest(sha256, element)
    elif part is None or isinstance(part, (str, int, float)):
        value = repr(part).encode()
        sha256.update(f"value of {len(value)} bytes\n".encode() + value)
    else:
        raise TypeError(f"{type(part).__name__} has no digest")


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
    (folder / ".writable").unlink(missing_ok=True)


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
