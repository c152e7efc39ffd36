"""A library: profiles in a folder or an object store, each in a folder of its own. What is in it is not read again."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sts_fast.data.prompts import PromptSet
from sts_fast.data.sets import Kind
from sts_fast.errors import InputError, listed
from sts_fast.files import Document
from sts_fast.profile.identity import Identity
from sts_fast.profile.profile import Profile, read_index
from sts_fast.profile.store import Folder, folder_of

SHOWN_DIGITS = 12  # of a key, in the name of a folder
NOT_IN_NAMES = re.compile(r"[^\w.-]+")


@dataclass(frozen=True)
class Library:
    """The profiles below one place: a folder, which need not exist yet, or an address such as s3://bucket/lib.

    Every method raises InputError where an object store cannot be reached; see Store.
    """

    place: Folder

    def __init__(self, place: str | Path) -> None:
        object.__setattr__(self, "place", folder_of(place))

    def __str__(self) -> str:
        return str(self.place)

    @property
    def folder(self) -> Path:
        """Of the profiles on this machine; of an object store, its mirror."""
        return self.place.path

    def path_of(self, identity: Identity) -> Path:
        """The place of a profile: named after its set and its key, so that no two sets share one."""
        name = NOT_IN_NAMES.sub("-", identity.set).strip("-.") or "set"
        return self.folder / f"{name}-{identity.kind}-{identity.key[:SHOWN_DIGITS]}"

    def get(self, identity: Identity, prompt_set: PromptSet) -> Profile | None:
        """The profile with this key, whatever the set was called; None where there is none.

        It gets a place of its own under its new name. One that was read behind demonstrations too serves where they are
        not asked for.

        prompt_set: of the same prompts, whose names and warnings the profile takes. Raises InputError where the profile
        is damaged, or the model's weights are not known, so that nothing says whether it is the model's.
        """
        if None in (model["weights_sha256"] for model in (identity.model, identity.tuned) if model is not None):
            raise InputError(
                f"a library needs to know the weights that sets were read with, which {identity.model['name']} does "
                "not tell: leave out --library"
            )
        self.place.resume(self.path_of(identity))
        for folder in self.place.find(f"*-{identity.key[:SHOWN_DIGITS]}"):
            if read_index(folder)["key"] == identity.key:
                profile = self._load(folder).of(identity, prompt_set)
                if not self.place.find(self.path_of(identity).name):
                    self.add(profile)
                return profile
        indices = self.indices() if identity.key == identity.plain_key else {}
        serving = {folder: index for folder, index in indices.items() if index["plain_key"] == identity.key}
        for folder in serving:
            profile = self._load(folder).plain().of(identity, prompt_set)
            if (identity.set, identity.kind) not in ((index["set"], index["kind"]) for index in serving.values()):
                self.add(profile)
            return profile
        return None

    def _load(self, folder: Path) -> Profile:
        self.place.fetch([folder])
        return Profile.load(folder)

    def add(self, profile: Profile) -> Path:
        """Writes a profile to its place. Raises InputError where it cannot be written."""
        path = self.path_of(profile.identity)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot write {self.folder}: {error.strerror or error}") from error
        profile.save(path)
        self.place.keep(path)
        return path

    def __iter__(self) -> Iterator[Path]:
        """The folders of all profiles, by name, with their files."""
        folders = self.place.find()
        self.place.fetch(folders)
        return iter(folders)

    def __len__(self) -> int:
        """How many profiles there are."""
        return len(self.place.find())

    def indices(self) -> dict[Path, Document]:
        """profile.json of every profile, by folder. Raises InputError where one is damaged."""
        return {folder: read_index(folder) for folder in self.place.find()}

    def shelf(self, sae: str | None = None) -> Shelf:
        """The profiles with one SAE, named by its source; None where there is only one.

        Raises InputError where there are none, or those of several SAEs.
        """
        indices = self.indices()
        if not indices:
            raise InputError(f"{self} has no profiles: make some with sts-fast profile")
        sources = sorted({index["sae"]["source"] for index in indices.values()})
        if sae is None and len(sources) > 1:
            raise InputError(f"{self} has profiles of several SAEs: choose one of {listed(sources)} with --sae")
        of_sae = {folder: index for folder, index in indices.items() if sae in (None, index["sae"]["source"])}
        if not of_sae:
            raise InputError(f"{self} has no profiles of the SAE {sae}, only of {listed(sources)}")
        return Shelf(self, of_sae)


@dataclass(frozen=True)
class Shelf:
    """A library's profiles with one SAE, of models before training; indices: profile.json by folder."""

    library: Library
    indices: Mapping[Path, Document]

    def find(self, kind: Kind, names: Sequence[str] | None = None, *, shown: bool) -> dict[str, Path]:
        """The folders of profiles, with their files, by name of the set; all of a kind where no names are given.

        shown: whether they must have been read behind demonstrations; otherwise one with them is as good as one without

        Raises InputError where a set is missing, several profiles of one name differ in their prompts, or all sets of a
        kind are asked for, and some were not read behind demonstrations.
        """
        known: dict[str, dict[str, Path]] = {}
        for folder, index in sorted(self.indices.items(), key=lambda item: item[1]["shown_sha256"] is None):
            if index["kind"] == kind and index["tuned"] is None and not (shown and index["shown_sha256"] is None):
                known.setdefault(index["set"], {}).setdefault(index["key" if shown else "plain_key"], folder)
        asked = list(known if names is None else dict.fromkeys(names))
        called = "domain" if kind == "domain" else "training set"
        untuned = [index for index in self.indices.values() if index["kind"] == kind and index["tuned"] is None]
        every = dict.fromkeys(index["set"] for index in untuned)
        if names is None and (alone := [name for name in every if name not in known]):
            raise InputError(
                f"the {called}s {listed(alone)} of {self.library} were not read behind demonstrations: make their "
                "profiles with them, name the sets to use, or move these profiles elsewhere"
            )
        if missing := [name for name in asked if name not in known]:
            behind = " that was read behind demonstrations" if shown else ""
            have = f"its {called}s are {listed(known)}" if known else "it has none"
            raise InputError(f"{self.library} has no {called} called {listed(missing)}{behind}: {have}")
        found = {name: _only(name, known[name]) for name in asked}
        self.library.place.fetch(found.values())
        return found


def _only(name: str, folders: Mapping[str, Path]) -> Path:
    if len(folders) > 1:
        raise InputError(
            f"the library has several profiles of '{name}', of different prompts: keep one of "
            f"{listed(folder.name for folder in folders.values())}"
        )
    return next(iter(folders.values()))
