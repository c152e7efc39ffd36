"""Scores of many training sets on many domains at once: sparse products of profiles, without a model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np

from sts_fast.errors import InputError
from sts_fast.forecast.dims import ranked_by
from sts_fast.forecast.estimators import BY_NAME, Estimator, SizeEstimator
from sts_fast.forecast.options import Dims
from sts_fast.ops._cpu import get_num_threads
from sts_fast.ops.shift import top_indices
from sts_fast.profile.identity import Identity
from sts_fast.profile.profile import Profile
from sts_fast.profile.prompt_sums import PromptSums
from sts_fast.statistics import grouped_ratio_intervals, resamples

if TYPE_CHECKING:
    import pandas as pd
    from scipy.sparse import csr_array

    from sts_fast.statistics import Doubles, Indices

Given = TypeVar("Given")
Made = TypeVar("Made")


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
    trains: Iterable[Profile | Path],
    domains: Iterable[Profile | Path],
    *,
    estimators: Sequence[SizeEstimator] = ("act", "icl"),
    dims: Literal["icl", "active"] = "icl",
    top_n: int = 100,
    seed: int = 0,
) -> Cross:
    """Scores every training set on every domain as `score` does, from profiles with one SAE; no model is run.

    trains, domains: profiles, gone through once, or their folders, of which only the columns that scores need are read;
        a few are in memory at a time, one for each thread
    estimators: see DomainScore for their equations
    dims:       D_N from demonstrations of the training set ('icl'), or its most active features ('active')
    top_n:      size of D_N; seed: of the resamplings behind the intervals

    Raises InputError where profiles are of different SAEs or models or of other tokens, a training set has nothing to
    rank features by, the SAE has no top_n features, or a file is damaged.
    """
    from scipy.sparse import csc_array

    found = list(_in_threads(lambda train: _top(train, dims, top_n), trains))
    if not found:
        raise InputError("there is no training set to compare: give the profile of one")
    first = found[0][0]
    for identity, _ in found:
        check_alike(first, identity)
    tops = np.stack([top for _, top in found])
    starts = np.arange(len(tops) + 1) * top_n
    members = csc_array((np.ones(tops.size), tops.ravel(), starts), shape=(int(first.sae["d_sae"]), len(tops))).tocsr()
    wanted = np.diff(members.indptr) > 0

    def scores(domain: Profile | Path) -> tuple[str, list[tuple[Doubles, Doubles]]]:
        whole = PromptSums.of(domain, [BY_NAME[name].sums for name in estimators])
        check_alike(first, whole.identity)
        of_prompts = replace(whole, sums=whole.sums.of_features(wanted))
        draws = resamples(len(whole.n_read), seed, whole.identity.set)
        return whole.identity.set, [_scores(BY_NAME[name], of_prompts, members, draws) for name in estimators]

    asked, of_domains = [], []
    for domain, of_domain in _in_threads(scores, domains):
        asked.append(domain)
        of_domains.append(of_domain)
    if not asked:
        raise InputError("there is no domain to score: give the profile of one")
    of_estimators = dict(zip(estimators, zip(*of_domains, strict=True), strict=True))
    return Cross(
        [identity.set for identity, _ in found],
        asked,
        {name: np.stack([values for values, _ in of], axis=1) for name, of in of_estimators.items()},
        {name: np.stack([intervals for _, intervals in of], axis=2) for name, of in of_estimators.items()},
        tops,
    )


def _in_threads(work: Callable[[Given], Made], given: Iterable[Given]) -> Iterator[Made]:
    """Works on a few at a time, one for each thread; in their order."""
    n_threads = get_num_threads()
    waiting: deque[Future[Made]] = deque()
    with ThreadPoolExecutor(n_threads) as pool:
        for one in given:
            waiting.append(pool.submit(work, one))
            if len(waiting) > n_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _scores(of: Estimator, domain: PromptSums, members: csr_array, draws: Doubles) -> tuple[Doubles, Doubles]:
    """[n_trains] scores of a domain by one estimator, and [2, n_trains] their intervals.

    members: [d_sae, n_trains] 1 where a feature is in D_N; draws: see `resamples`
    """
    n_trains = members.shape[1]
    n_terms = of.n_terms(domain.n_read, domain.n_pairs, members.nnz // n_trains)
    if n_terms.sum() == 0:
        return np.full(n_trains, np.nan), np.full((2, n_trains), np.nan)
    sums = (domain.sums.matrix(of.sums) @ members).toarray()
    return sums.sum(axis=0) / n_terms.sum(), grouped_ratio_intervals(sums, n_terms, draws, of.groups(domain.draw_of))


def _top(train: Profile | Path, dims: Dims, top_n: int) -> tuple[Identity, Indices]:
    """The identity of a training set, and its D_N."""
    quantity = ranked_by(dims)
    of_prompts = PromptSums.of(train, [quantity])
    identity, d_sae = of_prompts.identity, of_prompts.sums.d_sae
    if not 1 <= top_n <= d_sae:
        raise InputError(f"--top-n must lie between 1 and {d_sae}, the SAE's features, not {top_n}")
    if dims == "icl" and identity.tuned is not None:
        raise InputError(
            f"the profile of '{identity.set}' is of a model before and after training, not of demonstrations: give one "
            "that sts-fast profile makes"
        )
    if (of_prompts.n_read if dims == "active" else of_prompts.n_pairs).sum() == 0:
        raise InputError(
            f"the profile of '{identity.set}' was made without demonstrations: make it again with them, or take the "
            "most active features"
        )
    return identity, top_indices(of_prompts.sums.totals(quantity), top_n)


def check_alike(one: Identity, other: Identity) -> None:
    """Raises InputError where two profiles cannot be held against each other."""
    for what, a, b in (
        ("SAE", one.sae["fingerprint"], other.sae["fingerprint"]),
        ("model", one.model["weights_sha256"], other.model["weights_sha256"]),
        ("dtype", one.model["dtype"], other.model["dtype"]),
        ("place", one.model["module"], other.model["module"]),
        ("side", one.model["side"], other.model["side"]),
        ("choice of tokens", one.sampling["tokens"], other.sampling["tokens"]),
    ):
        if a != b:
            raise InputError(
                f"the profiles of '{one.set}' and '{other.set}' were made with another {what} each: give profiles "
                "of one model and one SAE"
            )
