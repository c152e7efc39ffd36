"""Many training sets on many domains at once, against `compare` on the same sets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import Tiny

import sts_fast
from sts_fast.errors import InputError

OPTIONS: dict[str, Any] = {"shots": 1, "domain_shots": 2, "limit": 12, "demo_draws": 3}
ESTIMATORS = ("act", "icl", "act_sq")


@pytest.fixture(scope="module")
def library(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cross") / "lib"
    sts_fast.profile(
        model=tiny.model, sae=tiny.saes["topk"], library=folder,
        trains={"sums": tiny.train, **tiny.domains}, domains=tiny.domains, **OPTIONS,
    )  # fmt: skip
    return folder


def profiles(library: Path, kind: str) -> list[sts_fast.Profile]:
    loaded = [sts_fast.Profile.load(folder) for folder in sts_fast.Library(library)]
    return [profile for profile in loaded if profile.identity.kind == kind]


@pytest.mark.parametrize("dims", ["icl", "active"])
def test_every_pair_is_as_compare_has_it(tiny: Tiny, library: Path, dims: Any) -> None:
    trains, domains = profiles(library, "train"), profiles(library, "domain")
    found = sts_fast.cross(trains, domains, estimators=ESTIMATORS, dims=dims, top_n=8, seed=3)
    forecasts = sts_fast.compare(
        model=tiny.model, sae=tiny.saes["topk"], trains={"sums": tiny.train, **tiny.domains}, domains=tiny.domains,
        estimators=ESTIMATORS, dims=dims, top_n=8, library=library if dims == "icl" else None, **OPTIONS,
    )  # fmt: skip
    assert found.trains == [profile.name for profile in trains]
    for i, train in enumerate(found.trains):
        for domain in forecasts[train].domains:
            k = found.domains.index(domain.name)
            for name in ESTIMATORS:
                assert found.values[name][i, k] == pytest.approx(domain.scores[name].value, rel=1e-12)


def test_intervals_are_those_of_score(tiny: Tiny, library: Path) -> None:
    trains, domains = profiles(library, "train"), profiles(library, "domain")
    found = sts_fast.cross(trains, domains, estimators=ESTIMATORS, top_n=8)
    forecast = sts_fast.score(
        model=tiny.model, sae=tiny.saes["topk"], train=tiny.train, domains=tiny.domains, estimators=ESTIMATORS,
        top_n=8, library=library, **OPTIONS,
    )  # fmt: skip
    i = found.trains.index("sums")
    for domain in forecast.domains:
        k = found.domains.index(domain.name)
        for name in ESTIMATORS:
            np.testing.assert_allclose(found.intervals[name][:, i, k], domain.scores[name].ci, rtol=1e-10)
    table = found.to_pandas()
    assert list(table.columns[:5]) == ["train", "domain", "act", "act_low", "act_high"]
    assert len(table) == len(trains) * len(domains)


def test_folders_give_what_their_profiles_give(library: Path) -> None:
    trains, domains = profiles(library, "train"), profiles(library, "domain")
    by_path = [[sts_fast.Library(library).path_of(of.identity) for of in of_kind] for of_kind in (trains, domains)]
    before = sts_fast.get_num_threads()
    try:
        for n_threads in (1, 3):
            sts_fast.set_num_threads(n_threads)
            one = sts_fast.cross(trains, domains, estimators=ESTIMATORS, top_n=8)
            other = sts_fast.cross(*by_path, estimators=ESTIMATORS, top_n=8)
            assert (one.trains, one.domains) == (other.trains, other.domains)
            assert np.array_equal(one.tops, other.tops)
            for name in ESTIMATORS:
                assert np.array_equal(one.values[name], other.values[name])
                assert np.array_equal(one.intervals[name], other.intervals[name])
    finally:
        sts_fast.set_num_threads(before)


def test_profiles_that_cannot_be_compared_are_refused(library: Path) -> None:
    trains, domains = profiles(library, "train"), profiles(library, "domain")
    sae = {**domains[0].identity.sae, "fingerprint": "0"}
    other = replace(domains[0], identity=replace(domains[0].identity, sae=sae))
    with pytest.raises(InputError, match="another SAE"):
        sts_fast.cross(trains, [other])
    tokens = replace(domains[0], identity=replace(domains[0].identity, sampling={"tokens": "last"}))
    with pytest.raises(InputError, match="another choice of tokens"):
        sts_fast.cross(trains, [tokens])
    tuned = replace(trains[0], identity=replace(trains[0].identity, tuned=trains[0].identity.model))
    with pytest.raises(InputError, match="before and after training"):
        sts_fast.cross([tuned], domains)
    with pytest.raises(InputError, match="--top-n must lie between 1 and 256"):
        sts_fast.cross(trains, domains, top_n=1000)
    with pytest.raises(InputError, match="no training set"):
        sts_fast.cross([], domains)
    with pytest.raises(InputError, match="no domain"):
        sts_fast.cross(trains, [], top_n=8)
