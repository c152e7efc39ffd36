"""The page of a library: every training set on every domain, and what carries each score."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sts_fast import files
from sts_fast.data.contamination import SAME, NgramIndex
from sts_fast.errors import InputError
from sts_fast.forecast.cross import Cross, cross
from sts_fast.forecast.estimators import BY_NAME, SizeEstimator
from sts_fast.forecast.run import REPORT_FILE
from sts_fast.forecast.search import same_questions
from sts_fast.profile.library import Library
from sts_fast.profile.prompt_sums import PromptSums, questions_of
from sts_fast.report.numbers import counted, percent, significant
from sts_fast.report.page import render

if TYPE_CHECKING:
    from sts_fast.statistics import Doubles, Indices

TEMPLATE = "library.html.j2"
ESTIMATOR: SizeEstimator = "act"
N_SHADES = 3
N_CARRIERS = 5


@dataclass(frozen=True)
class LibraryCell:
    """A training set's score on a domain.

    order:    its place among the training sets, by this domain
    shade:    its colour, by its size relative to the largest of this domain
    carriers: the features with the largest parts in it, as text
    same:     the ids of the training examples that share a run of tokens with the domain's questions
    """

    text: str
    interval: str
    order: int
    shade: str
    carriers: list[str]
    same: list[str]


@dataclass(frozen=True)
class TrainRow:
    """A training set: its size, and its cells, a domain each."""

    name: str
    n_prompts: int
    cells: list[LibraryCell]


def build_library_report(folder: str | Path, *, top_n: int = 100, sae: str | None = None) -> Path:
    """Writes report.html into a library's folder, of its training sets on its domains, and returns its path.

    folder: of the library; or its address in an object store, of which the mirror on this machine gets the report
    top_n: size of D_N, at most the features of the SAE; sae: source of the SAE, where the library has profiles of
        several

    Raises InputError where the library has no training set behind demonstrations or no domain, several profiles of one
    name, or nothing can be written.
    """
    shelf = Library(folder).shelf(sae)
    of = BY_NAME[ESTIMATOR]
    trains, domains = (list(shelf.find(kind, shown=kind == "train").values()) for kind in ("train", "domain"))
    if not trains or not domains:
        missing = "domain" if trains else "training set that was read behind demonstrations"
        raise InputError(f"{shelf.library} has no {missing}: add some with sts-fast profile")
    index = shelf.indices[trains[0]]
    top_n = min(top_n, index["sae"]["d_sae"])
    found = cross(trains, domains, estimators=(ESTIMATOR,), top_n=top_n)
    parts, asked = [], {}
    for name, domain in zip(found.domains, domains, strict=True):
        parts.append(PromptSums.of(domain, [of.sums]).sums.totals(of.sums))
        asked[name] = [question for _, question in questions_of(domain)]
    rows, ngrams = [], NgramIndex.of(asked)
    for i, train in enumerate(trains):
        same = same_questions(train, ngrams)
        cells = [
            LibraryCell(*_number(found, i, k), carriers=_carriers(parts[k], found.tops[i]), same=same.get(name, []))
            for k, name in enumerate(found.domains)
        ]
        rows.append(TrainRow(found.trains[i], shelf.indices[train]["n_prompts"], cells))
    page = render(
        TEMPLATE,
        rows=rows,
        domains=found.domains,
        sentence=f"{counted(len(trains), 'training set')} over {counted(len(domains), 'domain')}",
        label=of.label,
        meaning=of.meaning,
        top_n=top_n,
        same=SAME,
        model=index["model"]["name"],
        sae=index["sae"]["source"],
    )
    path = shelf.library.folder / REPORT_FILE
    with files.atomic_path(path) as written:
        written.write_text(page, encoding="utf-8", newline="\n")
    return path


def _number(found: Cross, i: int, k: int) -> tuple[str, str, int, str]:
    """Text, interval, order and shade of a cell."""
    of_domain, (low, high) = found.values[ESTIMATOR][:, k], found.intervals[ESTIMATOR][:, i, k]
    value = of_domain[i]
    if np.isnan(value):
        return "no tokens", "", len(of_domain), ""
    largest = np.nanmax(of_domain) or 1.0
    shade = min(N_SHADES, int((N_SHADES + 1) * value / largest))
    return (
        significant(float(value)),
        f"{significant(float(low))} to {significant(float(high))}",
        int((of_domain > value).sum()),
        f"size{shade}" if shade else "",
    )


def _carriers(parts: Doubles, members: Indices) -> list[str]:
    """The features of D_N with the largest parts of a score, and these parts."""
    own = parts[members]
    total, first = float(own.sum()), np.argsort(-own, kind="stable")[:N_CARRIERS]
    return [f"{members[j]} ({percent(own[j] / total)})" for j in first if own[j] > 0]
