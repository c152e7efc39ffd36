"""Scores of many training sets on many domains at once: sparse products of profiles, without a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from sts_fast.errors import InputError
from sts_fast.forecast.estimators import BY_NAME, SizeEstimator
from sts_fast.ops.shift import top_indices
from sts_fast.profile.profile import Profile
from sts_fast.statistics import grouped_ratio_intervals, resamples

if TYPE_CHECKING:
    import pandas as pd

    from sts_fast.statistics import Doubles, Indices


@dataclass(frozen=True)
class Cross:
    """Scores of every training set on every domain.

    trains, domains: their names
    values:    by estimator, [n_trains, n_domains]; NaN where a domain has no token for it
    intervals: by estimator, [2, n_trains, n_domains] the 95% interval, low and high
    tops:      [n_trains, top_n] D_N of each training set, most shifted first
    """

    trains: list[str]
    domains: list[str]
    values: dict[str, Doubles]
    intervals: dict[str, Doubles]
    tops: Indices

    def to_pandas(self) -> pd.DataFrame:
        """One row for each training set and domain."""
        import pandas as pd

        index = pd.MultiIndex.from_product([self.trains, self.domains], names=["train", "domain"])
        columns: dict[str, Doubles] = {}
        for name, values in self.values.items():
            low, high = self.intervals[name]
            columns |= {name: values.ravel(), f"{name}_low": low.ravel(), f"{name}_high": high.ravel()}
        return pd.DataFrame(columns, index=index).reset_index()


def cross(
    trains: Iterable[Profile],
    domains: Iterable[Profile],
    *,
    estimators: Sequence[SizeEstimator] = ("act", "icl"),
    dims: Literal["icl", "active"] = "icl",
    top_n: int = 100,
    seed: int = 0,
) -> Cross:
    """Scores every training set on every domain as `score` does, from profiles with one SAE; no model is run.

    trains, domains: profiles, gone through once, one in memory at a time
    estimators: see DomainScore for their equations
    dims:       D_N from demonstrations of the training set ('icl'), or its most active features ('active')
    top_n:      size of D_N; seed: of the resamplings behind the intervals

    Raises InputError where profiles are of different SAEs or models or of other tokens, a training set has nothing to
    rank features by, or the SAE has no top_n features.
    """
    from scipy.sparse import csc_array

    names, tops, first = [], [], None
    for profile in trains:
        first = first or profile
        check_alike(first, profile)
        if not 1 <= top_n <= profile.rows.d_sae:
            raise InputError(f"--top-n must lie between 1 and {profile.rows.d_sae}, the SAE's features, not {top_n}")
        names.append(profile.name)
        tops.append(_top(profile, dims, top_n))
    if first is None:
        raise InputError("there is no training set to compare: give the profile of one")
    starts = np.arange(len(tops) + 1) * top_n
    members = csc_array(
        (np.ones(starts[-1]), np.concatenate(tops), starts), shape=(first.rows.d_sae, len(tops))
    ).tocsr()
    asked: list[str] = []
    values: dict[str, list[Doubles]] = {name: [] for name in estimators}
    intervals: dict[str, list[Doubles]] = {name: [] for name in estimators}
    for profile in domains:
        check_alike(first, profile)
        asked.append(profile.name)
        draws = resamples(len(profile.rows), seed, profile.name)
        for name in estimators:
            of, log = BY_NAME[name], profile.log
            n_terms = (log.n_pairs if of.of == "pairs" else log.n_read).astype(np.float64)
            n_terms *= top_n if of.per_feature else 1
            sums = (profile.rows.matrix(of.sums) @ members).toarray()
            groups = profile.prompt_set.draw_of if of.of == "pairs" else np.zeros(len(n_terms), np.int32)
            if n_terms.sum() == 0:
                values[name].append(np.full(len(names), np.nan))
                intervals[name].append(np.full((2, len(names)), np.nan))
                continue
            values[name].append(sums.sum(axis=0) / n_terms.sum())
            intervals[name].append(grouped_ratio_intervals(sums, n_terms, draws, groups))
    if not asked:
        raise InputError("there is no domain to score: give the profile of one")
    return Cross(
        names,
        asked,
        {name: np.stack(columns, axis=1) for name, columns in values.items()},
        {name: np.stack(columns, axis=2) for name, columns in intervals.items()},
        np.stack(tops),
    )


def _top(profile: Profile, dims: str, top_n: int) -> Indices:
    if dims == "icl" and profile.identity.tuned is not None:
        raise InputError(
            f"the profile of '{profile.name}' is of a model before and after training, not of demonstrations: give one "
            "that sts-fast profile makes"
        )
    n = profile.n_tokens if dims == "active" else profile.n_pairs
    if n == 0:
        raise InputError(
            f"the profile of '{profile.name}' was made without demonstrations: make it again with them, or take the "
            "most active features"
        )
    return top_indices(profile.rows.totals("sum_h" if dims == "active" else "sum_sq_shift"), top_n)


def check_alike(one: Profile, other: Profile) -> None:
    """Raises InputError where two profiles cannot be held against each other."""
    for what, a, b in (
        ("SAE", one.identity.sae["fingerprint"], other.identity.sae["fingerprint"]),
        ("model", one.identity.model["weights_sha256"], other.identity.model["weights_sha256"]),
        ("dtype", one.identity.model["dtype"], other.identity.model["dtype"]),
        ("place", one.identity.model["module"], other.identity.model["module"]),
        ("side", one.identity.model["side"], other.identity.model["side"]),
        ("choice of tokens", one.identity.sampling["tokens"], other.identity.sampling["tokens"]),
    ):
        if a != b:
            raise InputError(
                f"the profiles of '{one.name}' and '{other.name}' were made with another {what} each: give profiles "
                "of one model and one SAE"
            )
