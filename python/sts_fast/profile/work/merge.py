"""Puts the pieces of a plan together, once all shards are read."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from sts_fast import files
from sts_fast.errors import InputError, listed
from sts_fast.files import Document
from sts_fast.profile.profile import Profile, read_index
from sts_fast.profile.work.plan import DONE_FOLDER, MERGED_FILE, PLAN_FILE, ProfilePlan


def merge(plan: ProfilePlan) -> None:
    """Joins the pieces of every set that was cut, and removes them. Processes that merge one plan do it in turn.

    Raises InputError where shards are missing, or sets were read with different weights.
    """
    with files.alone(plan.folder / PLAN_FILE):
        if not plan.is_merged():
            plan.write_record(MERGED_FILE, _wholes(plan))
        for folder in (plan.pieces.folder, plan.folder / DONE_FOLDER):
            shutil.rmtree(folder, ignore_errors=True)


def _wholes(plan: ProfilePlan) -> list[Path]:
    """The profiles of all sets; those of sets that were cut are written here."""
    if missing := plan.missing():
        raise InputError(
            f"{len(missing)} of {len(plan.shards)} shards of {plan.folder} are not read yet ({listed(missing, 5)}): "
            "start its workers again"
        )
    made = plan.done_profiles()
    for of_sae in zip(*(folders for _, folders in made), strict=True):
        _check_one_model(of_sae)
    found: list[Path] = []
    for index, prompt_set in enumerate(plan.sets):
        of_set = [folders for piece, folders in made if piece.set == index]
        # A worker that comes to a piece of a set that is whole already names that.
        whole = next((folders for folders in of_set if folders[0].parent == plan.library.folder), None)
        found += whole or [
            plan.library.add(Profile.joined([Profile.load(folder) for folder in of_sae], prompt_set))
            for of_sae in zip(*of_set, strict=True)
        ]
    return found


def _check_one_model(folders: Iterable[Path]) -> None:
    """Raises InputError where the profiles of one SAE were read with different models."""
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
