"""Forecasts from a library alone, against those of the model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import LIBRARY_OPTIONS, Tiny

import sts_fast
from sts_fast.cli import main
from sts_fast.errors import InputError


def run(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["sts-fast", *words])
    main()


@pytest.mark.parametrize("dims", ["icl", "active"])
def test_numbers_are_those_of_the_model(dims: Any, tiny: Tiny, library: Path) -> None:
    asked: dict[str, Any] = {"dims": dims, "estimators": ("act", "icl", "act_sq"), "top_n": 9}
    stored = sts_fast.compare_stored(library, ["days", "sums"], list(tiny.domains), **asked)
    assert list(stored) == ["days", "sums"]
    of_model = sts_fast.compare(
        model=tiny.model, sae=tiny.saes["topk"], trains={"days": tiny.domains["days"], "sums": tiny.train},
        domains=tiny.domains, library=library, **asked | LIBRARY_OPTIONS,
    )  # fmt: skip
    for name, forecast in stored.items():
        found, expected = forecast.to_dict(), of_model[name].to_dict()
        assert found["provenance"]["prompts_sha256"] == expected["provenance"]["prompts_sha256"]
        for key in ("train", "shift", "settled", "settings", "length"):
            assert found[key] == expected[key], key
        for domain, other in zip(found["domains"], expected["domains"], strict=True):
            assert domain == other
        for feature, other in zip(found["shifted_features"], expected["shifted_features"], strict=True):
            assert feature | {"promoted_tokens": None} == other | {"promoted_tokens": None}
        assert found["model"] | {"context_length": None} == expected["model"] | {"context_length": None}
        assert found["sae"]["mean_l0"] == expected["sae"]["mean_l0"]


def test_command_line(
    library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    words = ["score", "--library", str(library), "--train", "sums", "--top-n", "5", "--output", str(folder)]
    run(monkeypatch, [*words, "--domains", "days,spelling"])
    scores = json.loads((folder / "scores.json").read_text())
    assert [domain["name"] for domain in scores["domains"]] == ["days", "spelling"]
    assert scores["settings"]["top_n"] == 5
    assert scores["settings"]["domain_shots"] == 2
    assert {entry["role"] for entry in scores["provenance"]["inputs"]} == {"profile"}
    assert (folder / "report.html").is_file()
    capsys.readouterr()
    named = ["--train", "sums", "--train", "days"]
    run(monkeypatch, ["compare", "--library", str(library), *named, "--json", "--output", f"{folder}2"])
    compared = json.loads(capsys.readouterr().out)
    assert (folder.with_name("run2") / "sums" / "scores.json").is_file()
    assert len(compared["trains"]) == 2


def test_neither_torch_nor_a_model_is_loaded(library: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from sts_fast.cli import main\n"
        f"sys.argv = ['sts-fast', 'score', '--library', {str(library)!r}, '--train', 'sums',\n"
        f"    '--output', {str(tmp_path / 'run')!r}]\n"
        "main()\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys(), 'loaded'\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train", "other"], "no training set called other that was read behind demonstrations: its training sets"),
        (["--train", "sums", "--domains", "law"], "no domain called law"),
        (["--train", "sums", "--train", "days"], "sets of a library are not joined"),
        (["--train", "sums", "--shots", "5"], "omit --shots, or give --model"),
        (["--train", "sums", "--controls", "all"], "omit --controls"),
        (["--train", "sums", "--layer", "2"], "omit --layer"),
        (
            ["--train", "sums", "--domain-shots", "5", "--tokens", "query"],
            "omit --domain-shots, --tokens, or give --model",
        ),
        (["--train", "sums", "--calibration", "c.json"], "omit --calibration"),
        (["--train", "sums", "--estimators", "act,ntk"], "profiles have no answers"),
        (["--train", "sums", "--sae", "other"], "has no profiles of the SAE other"),
        (["--train", "sums", "--top-n", "999"], "--top-n is 999, but the SAE has"),
        (["--train", "sums", "--dry-run"], "--dry-run has nothing to tell"),
    ],
)
def test_what_is_refused(
    words: list[str],
    message: str,
    library: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, ["score", "--library", str(library), "--output", str(tmp_path / "run"), *words])
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_sets_without_demonstrations_are_named(tiny: Tiny, library: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(library, mixed)
    sts_fast.profile(
        model=tiny.model, sae=tiny.saes["topk"], library=mixed, domains={"more": tiny.domains["days"]},
        trains={"more": tiny.train}, shown=False, **LIBRARY_OPTIONS | {"limit": 11},
    )  # fmt: skip
    with pytest.raises(InputError, match=r"the domains more of .* were not read behind demonstrations"):
        sts_fast.compare_stored(mixed, ["sums"], top_n=5)
    assert len(sts_fast.compare_stored(mixed, ["sums"], list(tiny.domains), top_n=5)["sums"].domains) == 2
    assert len(sts_fast.compare_stored(mixed, ["sums"], estimators=("act",), top_n=5)["sums"].domains) == 3
    with pytest.raises(InputError, match=r"the training sets more of .* were not read behind demonstrations"):
        sts_fast.search(mixed, ["days"], top_n=5)


def test_estimators_that_need_the_model(library: Path) -> None:
    for options in ({"estimators": ("trial",)}, {"estimators": ("act", "ntk")}, {"dims": "tuned"}):
        with pytest.raises(InputError, match="need the model"):
            sts_fast.compare_stored(library, ["sums"], **options)  # type: ignore[arg-type]


def test_names_that_would_leave_the_folder(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sts_fast.profile(
        model=tiny.model, sae=tiny.saes["topk"], library=tmp_path / "lib", trains={"../up": tiny.train},
        domains=tiny.domains, **LIBRARY_OPTIONS,
    )  # fmt: skip
    with pytest.raises(SystemExit):
        run(
            monkeypatch,
            ["compare", "--library", str(tmp_path / "lib"), "--train", "../up", "--output", str(tmp_path / "run")],
        )
    assert not (tmp_path / "up").exists()


def test_a_shift_needs_the_model(library: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, ["shift", "--library", str(library), "--train", "sums"])
    assert "--model" in capsys.readouterr().err


def test_without_library_or_model(
    tiny: Tiny, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for words, message in (
        (["--train", "sums"], "give the model with --model, or --library"),
        (
            ["--train", str(tiny.train), "--model", str(tiny.model), "--domains", str(tiny.train)],
            "with --model, give --sae too",
        ),
    ):
        with pytest.raises(SystemExit) as stopped:
            run(monkeypatch, ["score", *words])
        assert stopped.value.code == 2
        assert message in " ".join(capsys.readouterr().err.split())


def test_profiles_that_do_not_go_together(tiny: Tiny, library: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    for n, name in enumerate(tiny.domains, start=1):
        sts_fast.profile(
            model=tiny.model, sae=tiny.saes["topk"], library=mixed, trains={"sums": tiny.train},
            domains={name: tiny.domains[name]}, **LIBRARY_OPTIONS | {"domain_shots": n},
        )  # fmt: skip
    with pytest.raises(InputError, match="different numbers of demonstrations"):
        sts_fast.compare_stored(mixed, ["sums"])
    assert sts_fast.compare_stored(mixed, ["sums"], estimators=("act",), top_n=5)["sums"].domains
    with pytest.raises(InputError, match="has no profiles: make some"):
        sts_fast.compare_stored(tmp_path / "none", ["sums"])
