"""Where the profiles of a library lie: in a folder, or in an object store that a folder on this machine mirrors."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from sts_fast import files
from sts_fast.errors import InputError, one_line
from sts_fast.files import Document
from sts_fast.profile.profile import (
    INDEX_FILE,
    RESIDUALS_FILE,
    ROWS_FILE,
    DamagedProfile,
    check_files,
    is_whole,
    read_index,
)

T = TypeVar("T")

# Also as a Path spells it, with one slash. A letter alone is a drive.
ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+):/+(.*)", re.DOTALL)
OF_FOLDERS = ("file", "local")
MIRRORED_FILE = "mirrored.json"  # of a mirror: by profile the version in the store, and the SHA-256 of profile.json
KEY_DIGITS = 12  # of an address's digest, in the name of its mirror
N_AT_ONCE = 16  # files that are on their way
# A store is given up after so many seconds, and one more for so many bytes of a file.
PATIENCE, SLOWEST = 120, 200_000


@dataclass(frozen=True)
class Folder:
    """Profiles in a folder, which need not exist yet."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def find(self, pattern: str = "*") -> list[Path]:
        """The folders of profiles whose names match, by name; of a store, only profile.json need be in them.

        Names that begin with a dot are those of profiles that are being written.
        """
        found = (index.parent for index in sorted(self.path.glob(f"{pattern}/{INDEX_FILE}")))
        return [folder for folder in found if not folder.name.startswith(".")]

    def fetch(self, folders: Iterable[Path]) -> None:
        """Makes sure that the files of profiles are in their folders, and of a store that they are whole."""

    def keep(self, folder: Path) -> None:
        """Is called once a profile lies in its folder; raises InputError where the store does not take it."""

    def resume(self, folder: Path) -> None:
        """Keeps a profile that an earlier process wrote to its folder, but did not bring into the store."""

    def prepare(self) -> None:
        """Raises InputError where no profiles can be kept, before any work is done."""
        files.prepare_folder(self.path)

    def for_plans(self) -> Path:
        """The folder, for processes to share a plan in it; raises InputError where they could not."""
        self.prepare()
        return self.path


@dataclass(frozen=True)
class Store(Folder):
    """Profiles in an object store, which is listed once, when it is first asked for any.

    path:    the mirror: a folder with profile.json of every profile, and with the other files of those that were used
    address: as fsspec names it, as in s3://bucket/lib

    Every method raises InputError where the store cannot be reached, or does not answer in time.
    """

    address: str

    def __str__(self) -> str:
        return self.address

    def find(self, pattern: str = "*") -> list[Path]:
        return [self.path / name for name in sorted(self._names) if fnmatchcase(name, pattern)]

    def fetch(self, folders: Iterable[Path]) -> None:
        self._at_once(self._fetch, ((folder, name) for folder in folders for name in (ROWS_FILE, RESIDUALS_FILE)))

    def keep(self, folder: Path) -> None:
        # Whoever lists the store takes a folder with a profile.json for a profile.
        for name in (ROWS_FILE, RESIDUALS_FILE, INDEX_FILE):
            path = folder / name
            put = partial(self._system.put_file, str(path), self._place_of(folder, name))
            try:
                self._ask("write", put, path.stat().st_size)
            except InputError as error:
                kept = f"the profile is kept in {folder}, and the same command uploads it"
                raise InputError(f"{error}; {kept}") from error
        self._names.add(folder.name)

    def resume(self, folder: Path) -> None:
        if folder.name not in self._names and (folder / INDEX_FILE).is_file():
            try:
                check_files(folder, read_index(folder))
            except InputError:
                return
            self.keep(folder)

    def prepare(self) -> None:
        self._names  # noqa: B018

    def for_plans(self) -> Path:
        raise InputError(
            f"processes share a plan in a folder that each of them sees, and {self.address} is an object store: give "
            "--library a folder, whose profiles may be copied to the store afterwards, or leave out --executor and "
            "--plan-only"
        )

    # The mirror -------------------------------------------------------------------------------------------------------

    @cached_property
    def _listing(self) -> Mapping[str, Document]:
        """Every file in the store by its place, with what the store says of it."""
        self._system.invalidate_cache()
        found: Mapping[str, Document] = self._ask("read", partial(self._system.find, self._root, detail=True))
        return found

    @cached_property
    def _names(self) -> set[str]:
        """The profiles in the store. What is new or other in it, the mirror has now too."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"no mirror of {self.address} can be kept in {self.path} ({error.strerror}): name another folder for "
                "caches in XDG_CACHE_HOME"
            ) from error
        listing = self._listing.items()
        versions = {name: _version(about) for place, about in listing if (name := self._profile_at(place))}
        mirrored = self._mirrored()
        if stale := [name for name, version in versions.items() if mirrored.get(name) != [version, self._digest(name)]]:
            self._at_once(self._fetch_index, ((name,) for name in stale))
            entries = {name: [version, self._digest(name)] for name, version in sorted(versions.items())}
            with files.atomic_path(self.path / MIRRORED_FILE) as temporary:
                temporary.write_text(files.to_json(entries), encoding="utf-8")
        return {*versions}

    def _mirrored(self) -> Document:
        try:
            return files.read_json(self.path / MIRRORED_FILE)
        except InputError:
            return {}

    def _digest(self, name: str) -> str | None:
        path = self.path / name / INDEX_FILE
        return files.sha256(path) if path.is_file() else None

    def _place_of(self, folder: Path, name: str) -> str:
        """Where a file of a profile lies in the store."""
        return f"{self._root}/{folder.name}/{name}"

    def _profile_at(self, place: str) -> str | None:
        """The name of the profile whose profile.json lies at a place in the store; None for any other file."""
        parts, above = ([part for part in of.split("/") if part] for of in (place, self._root))
        if len(parts) != len(above) + 2 or parts[-1] != INDEX_FILE:
            return None
        name = parts[-2]
        return name if Path(name).name == name and not name.startswith(".") else None

    def _fetch_index(self, name: str) -> None:
        """Takes over profile.json; the other files of another profile go with it."""
        folder = self.path / name
        path, place = folder / INDEX_FILE, self._place_of(folder, INDEX_FILE)
        content: bytes = self._ask("read", partial(self._system.cat_file, place))
        self._check_size(place, len(content))
        if not path.is_file() or path.read_bytes() != content:
            with files.atomic_folder(folder) as temporary:
                (temporary / INDEX_FILE).write_bytes(content)

    def _fetch(self, folder: Path, name: str) -> None:
        index, place = read_index(folder), self._place_of(folder, name)
        if is_whole(folder / name, index):
            return
        what = f"{self.address}/{folder.name}/{name}"
        remedy = f"remove {self.address}/{folder.name}, and make the profile again"
        try:
            with files.atomic_path(folder / name) as temporary:
                self._ask("read", partial(self._system.get_file, place, str(temporary)), self._size_of(place) or 0)
                self._check_size(place, temporary.stat().st_size)
                if files.sha256(temporary) != index["files"].get(name):
                    raise DamagedProfile(f"{what} is not the file that its {INDEX_FILE} names: {remedy}", folder)
        except _NotThere as error:
            raise DamagedProfile(f"{what} is missing: {remedy}", folder) from error

    def _size_of(self, place: str) -> int | None:
        """Bytes of a file when the store was listed; None where it was not there, or the store does not tell."""
        size: int | None = self._listing.get(place, {}).get("size")
        return size

    def _check_size(self, place: str, size: int) -> None:
        if self._size_of(place) not in (None, size):
            raise InputError(f"{place} did not arrive whole from {self.address}: give the same command again")

    # The store --------------------------------------------------------------------------------------------------------

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        """fsspec's file system, and the address in it."""
        from fsspec.core import url_to_fs
        from fsspec.registry import get_filesystem_class, known_implementations

        scheme = self.address.partition(":")[0]
        try:
            get_filesystem_class(scheme)
        except ValueError as error:
            raise InputError(
                f"{self.address} is in no store that fsspec knows: give a folder, or an address such as "
                "s3://bucket/lib, gs://bucket/lib or hf://datasets/owner/name"
            ) from error
        except ImportError as error:
            known = known_implementations[scheme]
            package = known["class"].partition(".")[0]
            remedy = known["err"] if package == "fsspec" else f"pip install '{package}'"
            raise InputError(f"to open {self.address}, a package is missing: {remedy}") from error
        system, root = self._ask("read", partial(url_to_fs, self.address))
        return system, root.rstrip("/")

    @property
    def _system(self) -> Any:
        return self._opened[0]

    @property
    def _root(self) -> str:
        return self._opened[1]

    def _ask(self, doing: Literal["read", "write"], call: Callable[[], T], size: int = 0) -> T:
        """What a call to the store returns. size: bytes of a file on its way"""
        seconds = PATIENCE + size // SLOWEST
        try:
            return _within(seconds, call)
        except FileNotFoundError as error:
            raise _NotThere(
                f"there is no {self.address} ({one_line(error)}): correct the address, or make the bucket or the data "
                "set first"
            ) from error
        except PermissionError as error:
            raise InputError(
                f"no permission to {doing} {self.address} ({one_line(error)}): log in to the store, or ask its owner"
            ) from error
        except TimeoutError as error:
            raise InputError(
                f"{self.address} did not answer within {seconds} seconds: check the network, and give the same command "
                "again"
            ) from error
        except Exception as error:  # the network, and the package of each store, can raise anything
            raise InputError(
                f"cannot {doing} {self.address} ({one_line(error)}): check the address, the login and the network"
            ) from error

    def _at_once(self, work: Callable[..., None], given: Iterable[tuple[Any, ...]]) -> None:
        self._opened  # noqa: B018 - once, before threads do
        with ThreadPoolExecutor(N_AT_ONCE) as pool:
            for _ in pool.map(lambda one: work(*one), given):
                pass


class _NotThere(InputError):
    """Raised where the store has no such file."""


def folder_of(place: str | Path) -> Folder:
    """Where profiles lie at a path, or at an address such as s3://bucket/lib."""
    text = place.as_posix() if isinstance(place, Path) else place
    if (match := ADDRESS.fullmatch(text)) is None:
        return Folder(Path(place))
    if match[1] in OF_FOLDERS:
        return Folder(Path(f"/{match[2]}"))
    address = f"{match[1]}://{match[2].rstrip('/')}"
    digest = hashlib.sha256(address.encode()).hexdigest()[:KEY_DIGITS]
    name = re.sub(r"[^\w-]+", "-", match[2]).strip("-")
    return Store(files.caches() / f"{name}-{digest}", address)


def _version(about: Document) -> str:
    """A digest of all that a store says of a file, such as its size, time and ETag: another file has another one."""
    return hashlib.sha256(repr(sorted(about.items())).encode()).hexdigest()


def _within(seconds: float, call: Callable[[], T]) -> T:
    """What a call returns; raises TimeoutError after so many seconds, with the call left to a thread that none awaits.

    A process ends without that thread.
    """
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return result.result(seconds)
