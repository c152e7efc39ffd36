"""Agreement of runs on the shifted features, beside chance: of predicted and true D_N, or of several choices."""

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
    """Share of the reference's D_N that another run's features contain.

    run:   folder of that run; features: 'shifted' (its D_N) or 'most active'
    share: |features and D_N| / |D_N|; chance: the share for as many random features, |features| / d_sae
    """

    run: str
    features: str
    share: float
    chance: float


@dataclass(frozen=True)
class Overlap:
    """reference: folder of the run whose D_N is compared, such as one with --dims tuned; top_n: |D_N|."""

    reference: str
    train: str
    dims: str
    top_n: int
    found: list[Found]

    def to_dict(self) -> Document:
        return asdict(self)


def overlap(reference: str | Path, runs: Sequence[str | Path]) -> Overlap:
    """Share of one run's shifted features that others found, from the files alone.

    With a run of --dims tuned as the reference, the others show how much of the true shift (STS paper, overlap of
    ICL-predicted and true top 100) was foreseen by demonstrations of the same training set, of other sets, and by the
    features that are most active anyway.

    Raises InputError for a folder without a run, and where the runs have different SAEs.
    """
    scores, truth, fingerprint = _read(reference)
    shifted, shares = truth["shifted"], []
    for folder in runs:
        _, features_of, other_fingerprint = _read(folder)
        if other_fingerprint != fingerprint:
            raise InputError(
                f"{folder} and {reference} were made with different SAEs, whose features cannot be compared: give "
                "runs with the same SAE"
            )
        for name, features in features_of.items():
            share = len(features & shifted) / len(shifted)
            shares.append(Found(str(folder), name, share, len(features) / scores["sae"]["d_sae"]))
    return Overlap(str(reference), scores["train"]["name"], scores["settings"]["dims"], len(shifted), shares)


def _read(folder: str | Path) -> tuple[Scores, dict[str, set[int]], str]:
    """The content of a run's scores.json, its sets of features by name, and the SAE's fingerprint."""
    run = Run.load(folder)
    means, arrays = run.means()
    names = {"shifted": "shifted_features", "most active": "most_active_features"}
    return run.scores, {name: set(arrays[key].tolist()) for name, key in names.items()}, means.sae_fingerprint
