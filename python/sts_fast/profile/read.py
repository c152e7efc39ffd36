"""Makes profiles: reads a set with a model, or from stored activations, once for all SAEs."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

import numpy as np

from sts_fast.data.prompts import PromptSet, Tell
from sts_fast.data.sets import Kind, Sampling
from sts_fast.model.log import PromptLog
from sts_fast.model.reader import PairedRows, Reader
from sts_fast.profile.identity import Identity, identity_of
from sts_fast.profile.library import Library
from sts_fast.profile.pieces import PIECES_FOLDER, cut
from sts_fast.profile.profile import Profile
from sts_fast.profile.residuals import ResidualSums
from sts_fast.profile.rows import PromptRows
from sts_fast.sae import SAE

# Entries of rows that are kept in memory while a set is read: 800 MB.
JOINED_ENTRIES = 2**24


def read_profiles(
    reader: Reader,
    saes: Sequence[SAE],
    kind: Kind,
    prompt_set: PromptSet,
    sampling: Sampling,
    *,
    tuned: Reader | None = None,
    library: Library | None = None,
    tell: Tell | None = None,
) -> list[Profile]:
    """The profile of a set by SAE, from one reading for all SAEs that the library has none of; it gets the new ones.

    kind:  whether it is a training set or a domain; sampling: the options that its prompts were made with
    tuned: the model after training, whose tokens are paired with these instead of those with demonstrations
    tell:  is told how many prompts are read, if any are

    Raises InputError as `Reader.rows` does.
    """
    identities = [identity_of(reader, tuned, sae, kind, prompt_set, sampling) for sae in saes]
    found = [None if library is None else library.get(identity, prompt_set) for identity in identities]
    making = {i: _Making(saes[i], prompt_set, identities[i]) for i, profile in enumerate(found) if profile is None}
    at = {i: reader.hooks.index(reader.hook(saes[i])) for i in making}
    done = 0
    for of_hooks in reader.rows(kind, prompt_set, tuned) if making else ():
        for i, of_sae in making.items():
            of_sae.add(of_hooks[at[i]])
        done += len(of_hooks[0].prompts)
        if tell is not None:
            tell(done, len(prompt_set.prompts))
    made = {i: of_sae.profile() for i, of_sae in making.items()}
    if library is not None:
        for profile in made.values():
            library.add(profile)
    return [made[i] if profile is None else profile for i, profile in enumerate(found)]


def read_set(
    reader: Reader,
    saes: Sequence[SAE],
    kind: Kind,
    prompt_set: PromptSet,
    sampling: Sampling,
    *,
    library: Library,
    most_tokens: int | None,
    tell: Tell,
) -> list[Profile]:
    """`read_profiles` of a set in the pieces that a plan would cut it into, each kept until all are read.

    most_tokens: of a piece; None: the set is read as a whole
    """
    pieces = [] if most_tokens is None else [piece for shard in cut([prompt_set], most_tokens) for piece in shard]
    if len(pieces) < 2:
        return read_profiles(reader, saes, kind, prompt_set, sampling, library=library, tell=tell)
    identities = [identity_of(reader, None, sae, kind, prompt_set, sampling) for sae in saes]
    found = [library.get(identity, prompt_set) for identity in identities]
    if wholes := [profile for profile in found if profile is not None] if None not in found else []:
        return wholes
    kept, parts = Library(library.folder / PIECES_FOLDER), []
    for piece in pieces:
        parts.append(read_profiles(reader, saes, kind, piece.of([prompt_set]), sampling, library=kept))
        tell(piece.stop, len(prompt_set.prompts))
    made = [Profile.joined(of_sae, prompt_set) for of_sae in zip(*parts, strict=True)]
    for profile in made:
        library.add(profile)
    for part in (part for of_piece in parts for part in of_piece):
        shutil.rmtree(kept.path_of(part.identity), ignore_errors=True)
    return made


class _Making:
    """One SAE's profile while its prompts are read, in whatever order."""

    def __init__(self, sae: SAE, prompt_set: PromptSet, identity: Identity) -> None:
        self.sae, self.prompt_set, self.identity = sae, prompt_set, identity
        self.log, self.residuals = PromptLog(prompt_set), ResidualSums.zero(sae.d_in)
        self.read: list[int] = []
        self.parts: list[PromptRows] = []
        self.recent: list[PromptRows] = []
        self.n_recent = 0

    def add(self, rows: PairedRows) -> None:
        self.recent.append(PromptRows.of(self.sae, rows))
        self.n_recent += len(self.recent[-1].indices)
        if self.n_recent >= JOINED_ENTRIES:
            self._join()
        self.read += rows.prompts
        self.residuals.update(rows)
        self.log.record(rows)

    def _join(self) -> None:
        # Many entries lie in files, and the memory of the parts is free again.
        self.parts.append(PromptRows.joined(self.recent))
        self.recent, self.n_recent = [], 0

    def profile(self) -> Profile:
        if self.recent or not self.parts:
            self._join()
        rows = PromptRows.joined(self.parts).take(np.argsort(np.asarray(self.read, np.int64)))
        return Profile(self.identity, self.prompt_set, self.log, rows, self.residuals)
