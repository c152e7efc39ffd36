"""How far runs agree on the shifted features: predicted and true D_N, several layers of choice, chance beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sts_fast.errors import InputError
from sts_fast.files import Document
from sts_fast.forecast.blocks import Scores
from sts_fast.forecast.run import Run


@dataclass(frozen=True)
class Found:
    """Part of the reference's D_N that a set of features holds.

    run:   folder of the run whose features they are; features: 'shifted' (its D_N) or 'most active'
    share: |features and D_N| / |D_N|; chance: what as many features drawn at random would hold, |features| / d_sae
    """

    run: str
    features: str
    share: float
    chance: float


@dataclass(frozen=True)
class Overlap:
    """reference: folder of the run whose D_N is to be found, such as one of --dims tuned; top_n: |D_N|."""

    reference: str
    train: str
    dims: str
    top_n: int
    found: list[Found]

    def to_dict(self) -> Document:
        return asdict(self)


def overlap(reference: str | Path, runs: Sequence[str | Path]) -> Overlap:
    """What part of one run's shifted features others found, from the files alone.

    Give the run of --dims tuned as the reference: then the others tell how much of the true shift (STS paper, overlap
    of ICL-predicted and true top 100) was foreseen by demonstrations of the same training set, of other sets, and by
    the features that are most active anyway.

    Raises InputError for a folder without a run, and where the runs have different SAEs.
    """
    scores, truth, fingerprint = _read(reference)
    shifted, found = truth["shifted"], []
    for folder in runs:
        _, features_of, other_fingerprint = _read(folder)
        if other_fingerprint != fingerprint:
            raise InputError(
                f"{folder} and {reference} were made with different SAEs, so their features do not compare"
            )
        for name, features in features_of.items():
            share = len(features & shifted) / len(shifted)
            found.append(Found(str(folder), name, share, len(features) / scores["sae"]["d_sae"]))
    return Overlap(str(reference), scores["train"]["name"], scores["settings"]["dims"], len(shifted), found)


def _read(folder: str | Path) -> tuple[Scores, dict[str, set[int]], str]:
    """What scores.json of a run holds, its sets of features by name, and the SAE's fingerprint."""
    run = Run.load(folder)
    stats, arrays = run.stats()
    names = {"shifted": "shifted_features", "most active": "most_active_features"}
    return run.scores, {name: set(arrays[key].tolist()) for name, key in names.items()}, stats.sae_fingerprint
