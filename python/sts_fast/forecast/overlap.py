"""How far runs agree on the shifted features: predicted and true D_N, several layers of choice, chance beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sts_fast import files
from sts_fast.errors import InputError
from sts_fast.forecast.run import DIMS_OF_ACTIVITY, SHIFT_FILE, read_scores


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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def overlap(reference: str | Path, runs: Sequence[str | Path]) -> Overlap:
    """What part of one run's shifted features others found, from the files alone.

    Give the run of --dims tuned as the reference: then the others tell how much of the true shift (STS paper, overlap
    of ICL-predicted and true top 100) was foreseen by demonstrations of the same training set, of other sets, and by
    the features that are most active anyway.

    Raises InputError for a folder without a run, and where the runs have different SAEs.
    """
    truth = _Run.read(Path(reference))
    found = []
    for folder in runs:
        run = _Run.read(Path(folder))
        if run.fingerprint != truth.fingerprint:
            raise InputError(
                f"{folder} and {reference} were made with different SAEs, so their features do not compare"
            )
        for name, features in (("shifted", run.shifted), ("most active", run.most_active)):
            share = len(features & truth.shifted) / len(truth.shifted)
            found.append(Found(str(folder), name, share, len(features) / truth.d_sae))
    return Overlap(str(reference), truth.train, truth.dims, len(truth.shifted), found)


@dataclass(frozen=True)
class _Run:
    train: str
    dims: str
    d_sae: int
    fingerprint: str
    shifted: set[int]
    most_active: set[int]

    @classmethod
    def read(cls, folder: Path) -> _Run:
        scores = read_scores(folder)
        dims = scores["settings"]["dims"]
        kind = "CorrelationStats" if dims in DIMS_OF_ACTIVITY else "ShiftStats"
        arrays, metadata = files.load_arrays(folder / SHIFT_FILE, kind)
        return cls(
            train=scores["train"]["name"],
            dims=dims,
            d_sae=scores["sae"]["d_sae"],
            fingerprint=metadata["sae_fingerprint"],
            shifted=set(arrays["shifted_features"].tolist()),
            most_active=set(arrays["most_active_features"].tolist()),
        )
