"""A library searched, against its scores set by set."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import LIBRARY_OPTIONS, Tiny

import sts_fast
from sts_fast.cli import main
from sts_fast.errors import InputError


def test_order_is_that_of_the_scores(tiny: Tiny, library: Path) -> None:
    up, keep = tiny.domains
    found = sts_fast.search(library, [up], [keep], top_n=8)
    forecasts = sts_fast.compare(
        model=tiny.model, sae=tiny.saes["topk"], trains={"sums": tiny.train, **tiny.domains}, domains=tiny.domains,
        estimators=("act", "icl"), top_n=8, library=library, **LIBRARY_OPTIONS,
    )  # fmt: skip
    for candidate in found:
        scores = {domain.name: domain.scores["act"] for domain in forecasts[candidate.name].domains}
        for name, (value, ci) in candidate.scores.items():
            assert value == pytest.approx(scores[name].value, rel=1e-12)
            np.testing.assert_allclose(ci, scores[name].ci, rtol=1e-10)
        assert candidate.selectivity == pytest.approx(scores[up].value / scores[keep].value)
    assert [candidate.selectivity for candidate in found] == sorted((c.selectivity for c in found), reverse=True)
    alone = sts_fast.search(library, [up], top_n=8)
    assert [c.scores[up][0] for c in alone] == sorted((c.scores[up][0] for c in alone), reverse=True)


def test_training_sets_that_hold_the_questions_are_named(tiny: Tiny, library: Path) -> None:
    found = {candidate.name: candidate.same for candidate in sts_fast.search(library, list(tiny.domains), top_n=8)}
    asked = {
        profile.name: {prompt.id for prompt in profile.prompt_set.prompts}
        for folder in sts_fast.Library(library)
        if (profile := sts_fast.Profile.load(folder)).identity.kind == "domain"
    }
    assert found.pop("sums") == {}
    for name, same in found.items():  # each is one of the domains
        assert set(same) == {name}
        assert set(same[name]) == asked[name]
        assert len(same[name]) == 12


def test_profiles_of_one_name_must_be_of_the_same_prompts(tiny: Tiny, library: Path, tmp_path: Path) -> None:
    folder, [up, _] = tmp_path / "lib", list(tiny.domains)
    shutil.copytree(library, folder)
    given: dict[str, Any] = {"model": tiny.model, "sae": tiny.saes["topk"], "library": folder}
    before = sts_fast.search(folder, [up], top_n=8)
    # The same prompts without demonstrations, or those of a model after training, do not count.
    sts_fast.profile(**given, **LIBRARY_OPTIONS, trains={"sums": tiny.train}, domains=tiny.domains, shown=False)
    sts_fast.score(
        **given,
        **LIBRARY_OPTIONS,
        train=tiny.train,
        domains={},
        dims="tuned",
        tuned=tiny.tuned,
        top_n=8,
        estimators=("act",),
    )
    assert sts_fast.search(folder, [up], top_n=8) == before
    sts_fast.profile(**given, **{**LIBRARY_OPTIONS, "domain_shots": 1}, domains=tiny.domains)
    assert sts_fast.search(folder, [up], top_n=8) == before  # for act, demonstrations of a domain do not matter
    with pytest.raises(InputError, match=f"several profiles of '{up}', of different prompts: keep one of {up}-domain-"):
        sts_fast.search(folder, [up], top_n=8, estimator="icl")
    sts_fast.profile(**given, **{**LIBRARY_OPTIONS, "limit": 10}, trains={"sums": tiny.train})
    with pytest.raises(InputError, match="several profiles of 'sums'"):
        sts_fast.search(folder, [up], top_n=8)


def test_what_is_not_there_is_said(tiny: Tiny, library: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no profiles: make some with sts-fast profile"):
        sts_fast.search(tmp_path, ["law"])
    with pytest.raises(InputError, match="no domain called law: its domains are "):
        sts_fast.search(library, ["law"])
    with pytest.raises(InputError, match="no domain was named"):
        sts_fast.search(library, [])
    folder = tmp_path / "two"
    shutil.copytree(library, folder)
    sts_fast.profile(
        model=tiny.model, sae=tiny.saes["jumprelu"], library=folder, trains={"sums": tiny.train}, **LIBRARY_OPTIONS
    )
    with pytest.raises(InputError, match=r"several SAEs: choose one of .* with --sae"):
        sts_fast.search(folder, list(tiny.domains))
    assert len(sts_fast.search(folder, list(tiny.domains), sae=str(tiny.saes["topk"]), top_n=8)) == 3
    with pytest.raises(InputError, match="no profiles of the SAE other"):
        sts_fast.search(folder, list(tiny.domains), sae="other")


def test_command_prints_a_table(
    tiny: Tiny, library: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    up, keep = tiny.domains
    words = ["sts-fast", "search", "--library", str(library), "--up", up, "--keep", keep, "--top-n", "8"]
    monkeypatch.setattr("sys.argv", words)
    main()
    printed = capsys.readouterr()
    assert "STS_act of 3 training sets" in printed.out
    assert "up / keep" in printed.out
    assert f"12 examples of '{up}' ask the same as questions of '{up}' (13 words in a row" in printed.err
    monkeypatch.setattr("sys.argv", [*words, "--json"])
    main()
    document = json.loads(capsys.readouterr().out)
    assert {candidate["name"] for candidate in document["candidates"]} == {"sums", *tiny.domains}
