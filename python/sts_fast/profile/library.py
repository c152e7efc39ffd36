"""A library: a folder of profiles, each in a folder of its own. What is in it is not read again."""

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
from sts_fast.profile.profile import INDEX_FILE, Profile, read_index

SHOWN_DIGITS = 12  # of a key, in the name of a folder
NOT_IN_NAMES = re.compile(r"[^\w.-]+")


@dataclass(frozen=True)
class Library:
    """The profiles below one folder, which need not exist yet."""

    folder: Path

    def __init__(self, folder: str | Path) -> None:
        object.__setattr__(self, "folder", Path(folder))

    def path_of(self, identity: Identity) -> Path:
        """The place of a profile: named after its set and its key, so that no two sets share one."""
        name = NOT_IN_NAMES.sub("-", identity.set).strip("-.") or "set"
        return self.folder / f"{name}-{identity.kind}-{identity.key[:SHOWN_DIGITS]}"

    def get(self, identity: Identity, prompt_set: PromptSet) -> Profile | None:
        """The profile with this key, whatever the set was called; None where there is none.

        It gets a place of its own under its new name. One that was read behind demonstrations too serves where they are
        not asked for.

        prompt_set: of the same prompts, whose name the profile takes. Raises InputError where the profile is damaged,
        or the model's weights are not known, so that nothing says whether it is the model's.
        """
        if None in (model["weights_sha256"] for model in (identity.model, identity.tuned) if model is not None):
            raise InputError(
                f"a library needs to know the weights that sets were read with, which {identity.model['name']} does "
                "not tell: leave out --library"
            )
        for folder in sorted(self.folder.glob(f"*-{identity.key[:SHOWN_DIGITS]}")):
            if (folder / INDEX_FILE).is_file() and read_index(folder)["key"] == identity.key:
                profile = Profile.load(folder).named(prompt_set.name, identity.kind)
                if not self.path_of(identity).exists():
                    self.add(profile)
                return profile
        indices = {folder: read_index(folder) for folder in self} if identity.key == identity.plain_key else {}
        serving = {folder: index for folder, index in indices.items() if index["plain_key"] == identity.key}
        for folder in serving:
            profile = Profile.load(folder).plain().named(prompt_set.name, identity.kind)
            if (identity.set, identity.kind) not in ((index["set"], index["kind"]) for index in serving.values()):
                self.add(profile)
            return profile
        return None

    def add(self, profile: Profile) -> Path:
        """Writes a profile to its place. Raises InputError where it cannot be written."""
        path = self.path_of(profile.identity)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot write {self.folder}: {error.strerror or error}") from error
        profile.save(path)
        return path

    def __iter__(self) -> Iterator[Path]:
        """The folders of all profiles, by name; not those that are being written, whose names begin with a dot."""
        return (index.parent for index in sorted(self.folder.glob(f"[!.]*/{INDEX_FILE}")))

    def shelf(self, sae: str | None = None) -> Shelf:
        """The profiles with one SAE, named by its source; None where there is only one.

        Raises InputError where there are none, or those of several SAEs.
        """
        indices = {folder: read_index(folder) for folder in self}
        if not indices:
            raise InputError(f"{self.folder} has no profiles: make some with sts-fast profile")
        sources = sorted({index["sae"]["source"] for index in indices.values()})
        if sae is None and len(sources) > 1:
            raise InputError(f"{self.folder} has profiles of several SAEs: choose one of {listed(sources)} with --sae")
        of_sae = {folder: index for folder, index in indices.items() if sae in (None, index["sae"]["source"])}
        if not of_sae:
            raise InputError(f"{self.folder} has no profiles of the SAE {sae}, only of {listed(sources)}")
        return Shelf(self.folder, of_sae)


@dataclass(frozen=True)
class Shelf:
    """A library's profiles with one SAE, of models before training; indices: profile.json by folder."""

    library: Path
    indices: Mapping[Path, Document]

    def find(self, kind: Kind, names: Sequence[str] | None = None, *, shown: bool) -> dict[str, Path]:
        """The profiles of sets by name, all of a kind where no names are given.

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
        return {name: _only(name, known[name]) for name in asked}


def _only(name: str, folders: Mapping[str, Path]) -> Path:
    if len(folders) > 1:
        raise InputError(
            f"the library has several profiles of '{name}', of different prompts: keep one of "
            f"{listed(folder.name for folder in folders.values())}"
        )
    return next(iter(folders.values()))
