"""A library: a folder of profiles, each in a folder of its own. What is in it is not read again."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sts_fast.data.prompts import PromptSet
from sts_fast.errors import InputError
from sts_fast.profile.identity import Identity
from sts_fast.profile.profile import INDEX_FILE, Profile, read_index

SHOWN_DIGITS = 12  # of a key, in the name of a folder
NOT_IN_NAMES = re.compile(r"[^\w.-]+")


@dataclass(frozen=True)
class Library:
    """The profiles below one folder, which need not exist yet."""

    folder: Path

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
        for folder in self if identity.key == identity.plain_key else ():
            if read_index(folder).get("plain_key") == identity.key:
                return Profile.load(folder).plain().named(prompt_set.name, identity.kind)
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
        """The folders of all profiles, by name."""
        return (index.parent for index in sorted(self.folder.glob(f"*/{INDEX_FILE}")))
