"""Puts the pieces of a plan together, once all shards are read."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from sts_fast.errors import InputError, listed
from sts_fast.files import Document
from sts_fast.profile.profile import Profile, read_index
from sts_fast.profile.work.plan import DONE_FOLDER, MERGED_FILE, ProfilePlan


def merge(plan: ProfilePlan) -> None:
    """Joins the pieces of every set that was cut, and removes them.

    Raises InputError where shards are missing, or sets were read with different weights.
    """
    if plan.is_merged():
        return
    if missing := plan.missing():
        raise InputError(
            f"{len(missing)} of {len(plan.shards)} shards of {plan.folder} are not read yet ({listed(missing, 5)}): "
            "start its workers again"
        )
    made = plan.done_profiles()
    _check_one_model(folder for _, of_piece in made for folder in of_piece)
    whole, pieces = [], []
    for index, prompt_set in enumerate(plan.sets):
        of_set = [folders for piece, folders in made if piece.set == index]
        for folders in zip(*of_set, strict=True):
            of_sae = list(dict.fromkeys(folders))
            if len(of_sae) == 1:
                whole.append(of_sae[0])
                continue
            parts = [Profile.load(folder) for folder in of_sae]
            whole.append(plan.library.add(Profile.joined(parts, prompt_set)))
            pieces += of_sae
    plan.write_record(MERGED_FILE, whole)
    for folder in pieces:
        shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(plan.folder / DONE_FOLDER, ignore_errors=True)


def _check_one_model(folders: Iterable[Path]) -> None:
    """Raises InputError where profiles were read with different models."""
    first: tuple[Path, Document] | None = None
    for folder in folders:
        model = read_index(folder)["model"]
        first = first or (folder, model)
        if model != first[1]:
            differing = sorted(name for name in model if model[name] != first[1][name])
            raise InputError(
                f"{first[0]} and {folder} were read with different models ({listed(differing)} differ): give every "
                "worker the same one, remove one of the two profiles, and start the workers again"
            )
