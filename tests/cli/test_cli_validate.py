"""sts-fast validate, on a run that was written by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from evaluation_results import accuracies, write_results
from written_run import make_scores, write_scores

from sts_fast.cli.app import main

NAMES = ("law", "math", "physics", "history")


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    scores = make_scores(len(NAMES))
    for domain, name in zip(scores["domains"], NAMES, strict=True):
        domain["name"] = name
    scores["model"]["name"] = "/models/base"
    return write_scores(tmp_path / "run", scores)


def validate(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """The exit code."""
    monkeypatch.setattr(sys, "argv", ["sts-fast", "validate", *map(str, words)])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_differences_are_warnings_and_stop_a_strict_run(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    first = write_results(tmp_path / "a", accuracies(law=0.31, math=0.42, physics=0.28, history=0.55))
    more = accuracies(law=0.33, math=0.70, physics=0.45, history=0.50)
    second = write_results(tmp_path / "b", more, shots=0, model="out/tuned")
    words = (run_folder, "--before", first, "--after", second)
    said = "before and after were evaluated differently: number of demonstrations is 5 before and 0 after"
    assert validate(monkeypatch, *words) == 0
    assert f"warning: {said}\n" in capfd.readouterr().err
    written = json.loads((run_folder / "validation.json").read_text())
    assert said in written["warnings"]
    assert written["mismatches"] == [said]
    assert said in " ".join((run_folder / "report.html").read_text().split())

    (run_folder / "validation.json").unlink()
    assert validate(monkeypatch, *words, "--strict") == 2
    assert capfd.readouterr().err == f"error: {said} (--strict)\n"
    assert not (run_folder / "validation.json").exists()
    alike = write_results(tmp_path / "c", more, model="out/tuned")
    assert validate(monkeypatch, run_folder, "--before", first, "--after", alike, "--strict") == 0


def test_names_and_metrics_are_given_by_task(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folders = []
    for name, law, wmt in (("a", 0.5, 20.0), ("b", 0.6, 25.0)):
        entries = accuracies(college_law=law, math=0.4, physics=0.3) | {"wmt": {"bleu,none": wmt, "acc,none": 0.1}}
        folders.append(write_results(tmp_path / name, entries, model=f"x/{name}"))
    words: list[object] = [run_folder, "--before", folders[0], "--after", folders[1]]
    assert validate(monkeypatch, *words) == 2
    assert "name those that belong together with --match DOMAIN=TASK" in capfd.readouterr().err
    words += ["--match", "law=college_law", "--match", "history=wmt"]
    # A task that is there, but has none of the metric, is named with those that it has; and that remedy works.
    assert validate(monkeypatch, *words, "--metric", "exact_match", "--metric", "math=acc") == 2
    assert "there is no outcome 'college_law'" in (err := capfd.readouterr().err)
    assert "college_law (acc,none)" in err
    assert "name one with --metric TASK=METRIC" in err
    assert validate(monkeypatch, *words, "--metric", "acc", "--metric", "wmt=bleu", "--json") == 0
    domains = {domain["name"]: domain for domain in json.loads(capfd.readouterr().out)["domains"]}
    assert domains["law"]["outcome"]["change"] == pytest.approx(0.1)
    assert (domains["history"]["outcome"]["change"], domains["history"]["outcome"]["metric"]) == (5.0, "bleu,none")


@pytest.mark.parametrize(
    ("match", "message"),
    [
        (["law"], "--match takes DOMAIN=TASK, not 'law'"),
        (["law=a", "law=b"], "--match is given twice for 'law'"),
        (["art=math"], "the forecast has no domain 'art', only law, math, physics, history"),
        (["law=art"], "there is no outcome 'art' to match 'law' with, only law, math, physics, history"),
        (["law=math"], "the domains 'law' and 'math' both match outcome 'math'"),
    ],
)
def test_faults_of_match(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    match: list[str], message: str,
) -> None:  # fmt: skip
    table = tmp_path / "x.csv"
    table.write_text("domain,change\n" + "".join(f"{name},.{i}\n" for i, name in enumerate(NAMES)))
    words = [word for text in match for word in ("--match", text)]
    assert validate(monkeypatch, run_folder, "--before", table, *words) == 2
    err = capfd.readouterr().err
    assert message in " ".join(err.split())
    assert err.startswith("error: ")
