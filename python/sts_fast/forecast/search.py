"""A library searched: which training sets are forecast to move some domains most, and to leave others alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sts_fast.data.contamination import NgramIndex
from sts_fast.errors import InputError
from sts_fast.forecast.cross import cross
from sts_fast.forecast.estimators import BY_NAME, SizeEstimator
from sts_fast.profile.library import Library
from sts_fast.profile.prompt_sums import questions_of
from sts_fast.statistics import Interval


@dataclass(frozen=True)
class Candidate:
    """A training set that was found.

    scores:    by domain that was asked for, its score and 95% interval
    selectivity: mean score of the domains to move, over that of those to keep; of no domain to keep, the former
    same:      by domain, the ids of the training examples that ask the same as one of its questions; see NgramIndex
    """

    name: str
    scores: dict[str, tuple[float, Interval]]
    selectivity: float
    same: dict[str, list[str]]


def search(
    library: str | Path,
    up: Sequence[str],
    keep: Sequence[str] = (),
    *,
    estimator: SizeEstimator = "act",
    top_n: int = 100,
    sae: str | None = None,
    seed: int = 0,
) -> list[Candidate]:
    """The training sets of a library, those first that are forecast to move `up` most in proportion to `keep`.

    up, keep: names of domains in the library
    sae:      source of the SAE whose profiles are searched, where the library has those of several

    estimator: whose scores; top_n: size of D_N, from demonstrations; seed: of the resamplings behind the intervals

    A score says how much a domain will move, not in which direction. Raises InputError where the library has no such
    domain or no training set behind demonstrations, or several profiles of one name.
    """
    if not up:
        raise InputError("no domain was named: say which ones should move, with --up")
    shelf = Library(library).shelf(sae)
    known = shelf.find("domain", [*up, *keep], shown=BY_NAME[estimator].of == "pairs")
    trains = list(shelf.find("train", shown=True).values())
    found = cross(trains, known.values(), estimators=(estimator,), top_n=top_n, seed=seed)
    values, intervals = found.values[estimator], found.intervals[estimator]
    moved, kept = ([found.domains.index(name) for name in names] for names in (up, keep))
    wanted = values[:, moved].mean(axis=1)
    unwanted = values[:, kept].mean(axis=1) if kept else np.ones(len(trains))
    selectivity = np.divide(wanted, unwanted, out=np.full(len(trains), np.inf), where=unwanted > 0)
    ngrams = NgramIndex.of({name: [question for _, question in questions_of(folder)] for name, folder in known.items()})
    candidates = []
    for i in np.argsort(-selectivity, kind="stable"):
        scores = {
            name: (float(values[i, k]), (float(intervals[0, i, k]), float(intervals[1, i, k])))
            for k, name in enumerate(found.domains)
        }
        candidates.append(Candidate(found.trains[i], scores, float(selectivity[i]), same_questions(trains[i], ngrams)))
    return candidates


def same_questions(train: Path, ngrams: NgramIndex) -> dict[str, list[str]]:
    """Ids of the training examples that ask the same as a domain's questions, by domain; none of one without.

    train: the folder of the training set's profile
    """
    asked = questions_of(train)
    shared = ngrams.shared(question for _, question in asked)
    return {name: [asked[at][0] for at in places] for name, places in shared.items()}
