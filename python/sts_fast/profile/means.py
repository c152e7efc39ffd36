"""Means over a set of what each feature does: the dense part of a profile that a forecast keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sts_fast import files
from sts_fast.errors import InputError
from sts_fast.profile.profile import Profile

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sts_fast.statistics import Counts, Doubles

KIND = "features"


@dataclass(frozen=True)
class FeatureMeans:
    """Means over a set's tokens, of every feature of an SAE.

    sae_source, sae_fingerprint: which SAE; n_tokens, n_pairs: tokens read without demonstrations, and with them too
    activation:    [d_sae] E_x h_j(x)
    n_fired:       [d_sae] int64 number of the n_tokens tokens on which each fires
    shift:         [d_sae] E_x h_j(demos, x) - h_j(x), over pairs; zeros where there are none, as in the next
    squared_shift: [d_sae] E_x ||h_j(demos, x) - h_j(x)||^2
    importance:    [d_sae] the measure that ranks features for D_N
    replicates:    [d_sae, n_replicates] the same for resamplings of the prompts, up to a factor
    """

    sae_source: str
    sae_fingerprint: str
    n_tokens: int
    n_pairs: int
    activation: Doubles
    n_fired: Counts
    shift: Doubles
    squared_shift: Doubles
    importance: Doubles
    replicates: Doubles

    @classmethod
    def of(cls, profile: Profile, importance: Doubles, replicates: Doubles) -> FeatureMeans:
        sae, rows = profile.identity.sae, profile.rows
        return cls(
            sae_source=sae["source"],
            sae_fingerprint=sae["fingerprint"],
            n_tokens=profile.n_tokens,
            n_pairs=profile.n_pairs,
            activation=profile.mean_activation(),
            n_fired=rows.totals("n_fired").astype(np.int64),
            shift=rows.totals("sum_shift") / max(profile.n_pairs, 1),
            squared_shift=profile.mean_squared_shift(),
            importance=importance,
            replicates=replicates,
        )

    @classmethod
    def load(cls, path: Path) -> tuple[FeatureMeans, dict[str, NDArray[Any]]]:
        """Reads what `save` wrote, and the other arrays beside it.

        Raises InputError where the file is missing, lacks an array, or has one of another shape or type.
        """
        arrays, metadata = files.load_arrays(path, KIND)
        lacking = [name for name in (*ARRAYS, *NUMBERS) if name not in (*arrays, *metadata)]
        if lacking:
            raise InputError(f"{path} has no '{lacking[0]}': it is damaged, make the run again")
        shape = arrays["importance"].shape
        for name in ARRAYS:
            n_dims, kind = (2 if name == "replicates" else 1), ("i" if name == "n_fired" else "f")
            if arrays[name].ndim != n_dims or arrays[name].shape[:1] != shape or arrays[name].dtype.kind != kind:
                raise InputError(f"{path} has another '{name}' than a run writes: it is damaged, make the run again")
        try:
            numbers = {name: int(metadata[name]) for name in ("n_tokens", "n_pairs")}
        except ValueError as error:
            raise InputError(f"{path} is damaged ({error}): make the run again") from error
        texts = {name: metadata[name] for name in ("sae_source", "sae_fingerprint")}
        means = cls(**texts, **numbers, **{name: arrays[name] for name in ARRAYS})  # type: ignore[arg-type]
        return means, {name: array for name, array in arrays.items() if name not in ARRAYS}

    def save(self, path: Path, more: Mapping[str, NDArray[Any]]) -> None:
        """Writes it as one safetensors file, with more arrays."""
        metadata = {name: str(getattr(self, name)) for name in NUMBERS}
        files.save_arrays(path, {name: getattr(self, name) for name in ARRAYS} | {**more}, {"kind": KIND, **metadata})


NUMBERS = ("sae_source", "sae_fingerprint", "n_tokens", "n_pairs")
ARRAYS = tuple(field.name for field in fields(FeatureMeans) if field.name not in NUMBERS)
