"""Libraries: what is in one is not read again, and forecasts from it are the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from tiny import Tiny

import sts_fast
from sts_fast.cli import main
from sts_fast.errors import InputError
from sts_fast.model.language_model import LanguageModel
from sts_fast.profile.profile import INDEX_FILE, ROWS_FILE

OPTIONS: dict[str, Any] = {"shots": 1, "domain_shots": 2, "limit": 12, "demo_draws": 2}


@pytest.fixture(scope="module")
def library(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library") / "lib"
    made = sts_fast.profile(
        model=tiny.model, sae=[tiny.saes["topk"], tiny.saes["jumprelu"]], library=folder,
        trains={"sums": tiny.train}, domains=tiny.domains, **OPTIONS,
    )  # fmt: skip
    assert [profile.name for profile in made] == ["sums"] * 2 + [name for name in tiny.domains for _ in range(2)]
    return folder


def scores_of(forecast: sts_fast.Forecast) -> dict[str, Any]:
    document = forecast.to_dict()
    return {key: document[key] for key in ("shift", "shifted_features", "domains", "length")}


def test_each_profile_has_a_folder_of_its_own(tiny: Tiny, library: Path) -> None:
    folders = list(sts_fast.Library(str(library)))
    assert len(folders) == 2 * (1 + len(tiny.domains))
    profiles = [sts_fast.Profile.load(folder) for folder in folders]
    assert all(profile.identity.key[:12] in folder.name for profile, folder in zip(profiles, folders, strict=True))
    assert {(profile.name, profile.identity.kind) for profile in profiles} == {
        ("sums", "train"), *((name, "domain") for name in tiny.domains)
    }  # fmt: skip


def test_nothing_in_a_library_is_read_again(tiny: Tiny, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {
        "model": tiny.model, "sae": tiny.saes["topk"], "train": tiny.train, "domains": tiny.domains, "top_n": 8,
        "estimators": ("act", "icl", "act_sq"), **OPTIONS,
    }  # fmt: skip
    anew = sts_fast.score(**given)

    def rows(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a set is read")

    monkeypatch.setattr(LanguageModel, "rows", rows)
    again = sts_fast.score(**given, library=library)
    assert scores_of(again) == scores_of(anew)
    assert again.prompts.equals(anew.prompts)
    assert again.firings.equals(anew.firings)
    # Whatever its features are chosen by.
    for top_n in (3, 50):
        assert len(sts_fast.score(**{**given, "top_n": top_n}, library=library).shifted_features) == top_n
    with pytest.raises(AssertionError, match="a set is read"):
        sts_fast.score(**{**given, "shots": 2}, library=library)


def test_a_profile_with_demonstrations_serves_without(
    tiny: Tiny, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {
        "model": tiny.model, "sae": tiny.saes["topk"], "train": tiny.train, "domains": tiny.domains, "top_n": 8,
        "estimators": ("act", "act_sq"), "dims": "active", **OPTIONS,
    }  # fmt: skip
    anew = scores_of(sts_fast.score(**given))

    def rows(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a set is read")

    monkeypatch.setattr(LanguageModel, "rows", rows)
    again = scores_of(sts_fast.score(**given, library=library))
    # Behind demonstrations the same prompts ran in other batches, which round otherwise.
    assert max(deviation for _, deviation in oracle.deviations(as_expected(anew), again)) < 1e-5


def as_expected(document: Any) -> Any:
    """Numbers as the oracle has them: the lowest, the value, the highest."""
    if isinstance(document, dict):
        return {key: as_expected(value) for key, value in document.items()}
    if isinstance(document, list):
        return [as_expected(value) for value in document]
    return np.full(3, document) if isinstance(document, float) else document


def test_weights_that_are_not_known_are_told(tiny: Tiny, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LanguageModel, "weights_sha256", lambda self, hook=None: None)
    with pytest.raises(InputError, match="needs to know the weights"):
        sts_fast.profile(
            model=tiny.model, sae=tiny.saes["topk"], library=library, trains={"sums": tiny.train}, **OPTIONS
        )


def test_what_is_new_is_added(tiny: Tiny, library: Path, tmp_path: Path) -> None:
    folder = tmp_path / "lib"
    shutil.copytree(library, folder)
    before = set(sts_fast.Library(folder))
    sts_fast.score(
        model=tiny.model, sae=tiny.saes["topk"], train=tiny.train, domains=tiny.domains, library=folder, top_n=8,
        **{**OPTIONS, "domain_shots": 1},
    )  # fmt: skip
    new = set(sts_fast.Library(folder)) - before
    assert {sts_fast.Profile.load(path).name for path in new} == set(tiny.domains)


def test_damaged_profile_is_named(tiny: Tiny, library: Path, tmp_path: Path) -> None:
    folder = tmp_path / "lib"
    shutil.copytree(library, folder)
    for path in sts_fast.Library(folder):
        (path / ROWS_FILE).write_bytes(b"PAR1")
    with pytest.raises(InputError, match=f"{ROWS_FILE} is missing or damaged: make the profile again"):
        sts_fast.score(
            model=tiny.model, sae=tiny.saes["topk"], train=tiny.train, domains=tiny.domains, library=folder, top_n=8,
            **OPTIONS,
        )  # fmt: skip


def test_what_a_killed_command_left_is_not_read(library: Path, tmp_path: Path) -> None:
    folder = tmp_path / "lib"
    shutil.copytree(library, folder)
    before = list(sts_fast.Library(folder))
    killed = folder / f".{before[0].name}.0123456789abcdef.tmp"
    shutil.copytree(before[0], killed)
    (killed / INDEX_FILE).write_text("{")
    assert list(sts_fast.Library(folder)) == before


def test_names_of_sets_make_folders(tiny: Tiny, tmp_path: Path) -> None:
    sts_fast.profile(
        model=tiny.model, sae=tiny.saes["topk"], library=tmp_path, trains={"../a b/ü": tiny.train}, **OPTIONS
    )
    [folder] = sts_fast.Library(tmp_path)
    assert folder.parent == tmp_path
    assert folder.name.startswith("a-b-ü-train-")
    assert sts_fast.Profile.load(folder).name == "../a b/ü"


def test_command_makes_a_library(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    words = ["profile", "--model", str(tiny.model), "--sae", str(tiny.saes["topk"]), "--train", f"sums={tiny.train}"]
    words += [word for name, path in tiny.domains.items() for word in ("--domains", f"{name}={path}")]
    words += ["--shots", "1", "--domain-shots", "2", "--limit", "12", "--library", str(tmp_path / "lib")]
    monkeypatch.setattr("sys.argv", ["sts-fast", *words])
    main()
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 1 + len(tiny.domains)
    assert told[0].startswith("sums (train): 12 prompts, ")
    index = json.loads(next(iter(sts_fast.Library(tmp_path / "lib"))).joinpath(INDEX_FILE).read_text())
    assert index["sampling"]["limit"] == 12


def test_one_set_may_have_several_names_and_uses(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {
        "model": tiny.model, "sae": tiny.saes["topk"], "library": tmp_path, **OPTIONS, "domain_shots": 1,
    }  # fmt: skip
    sts_fast.profile(**given, trains={"sums": tiny.train})
    monkeypatch.setattr(LanguageModel, "rows", None)
    [again] = sts_fast.profile(**given, domains={"numbers": tiny.train})
    assert (again.name, again.identity.kind) == ("numbers", "domain")
    found = [sts_fast.Profile.load(folder) for folder in sts_fast.Library(tmp_path)]
    assert {(one.name, one.identity.kind) for one in found} == {("sums", "train"), ("numbers", "domain")}
    assert len({one.identity.key for one in found}) == 1
    # Also where it was read behind demonstrations, which are not asked for now.
    for name, n in (("numbers", 2), ("without", 3)):
        [plain] = sts_fast.profile(**given, domains={name: tiny.train}, shown=False)
        assert (plain.name, plain.n_pairs) == (name, 0)
        assert len([*sts_fast.Library(tmp_path)]) == n


def test_a_set_that_is_too_small_is_left_out(tiny: Tiny, tmp_path: Path) -> None:
    given: dict[str, Any] = {"model": tiny.model, "sae": tiny.saes["topk"], "library": tmp_path / "lib", **OPTIONS}
    few = [{"question": "Why?", "answer": "So."}]
    said: list[str] = []
    made = sts_fast.profile(**given, trains={"sums": tiny.train, "few": few}, say=said.append)
    assert [profile.name for profile in made] == ["sums"]
    assert any(line.startswith("warning: a set is left out: ") and "few" in line for line in said)
    with pytest.raises(InputError, match="strict"):
        sts_fast.profile(**given, trains={"sums": tiny.train, "few": few}, strict=True)
    with pytest.raises(InputError, match="few"):
        sts_fast.profile(**given, trains={"few": few})


def test_nothing_to_profile_is_said(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give a training set or a domain"):
        sts_fast.profile(model=tiny.model, sae=tiny.saes["topk"], library=tmp_path)
