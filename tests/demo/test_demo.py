"""The demo: its forecasts against the oracle, its correlations from its files, its words, its command."""

from __future__ import annotations

import json
import math
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pyarrow.parquet as pq
import pytest
from expected_scores import assert_as_expected
from html_tree import read_page
from made_up_demo import made_up
from scipy.stats import pearsonr

import sts_fast
from sts_fast import InputError, cli
from sts_fast.demo import demo, organism
from sts_fast.demo.demo import FEW_SHOT, OUTCOMES, PREDICTORS, PRIMARY, SIGNED
from sts_fast.profile.means import FeatureMeans
from sts_fast.report import build_demo_report

TRAINS = ("T0.reverse.a", "T5.sort.d")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "library"


@pytest.fixture(scope="module")
def done(library: Path) -> demo.Demo:
    return demo.run_demo(trains=TRAINS, library=library)


@pytest.fixture(scope="module")
def saved(done: demo.Demo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    done.save(folder)
    return folder


def written(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


# ---- numbers


def test_forecasts_equal_the_oracle(saved: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A few of the 72 domains, which the oracle reads one question at a time."""
    run = tmp_path / "run"
    shutil.copytree(saved / TRAINS[0], run)
    scores = written(run / "scores.json")
    chosen = [0, 71]
    scores["domains"] = [scores["domains"][i] for i in chosen]
    for domain in scores["domains"]:
        forget_other_domains(domain["controls"])
    (run / "scores.json").write_text(json.dumps(scores))
    means, arrays = FeatureMeans.load(run / "shift.safetensors")
    arrays["domain_mean_residuals"] = arrays["domain_mean_residuals"][chosen]
    means.save(run / "shift.safetensors", arrays)
    names = {domain["name"] for domain in scores["domains"]}
    table = pq.read_table(run / "prompts.parquet")
    keep = [row["stage"] == "shift" or row["domain"] in names for row in table.select(["stage", "domain"]).to_pylist()]
    pq.write_table(table.filter(keep), run / "prompts.parquet")
    expected = oracle.expect(run, organism.model_folder(), organism.sae_folder())
    for domain in expected.scores["domains"]:
        forget_other_domains(domain["controls"])
    assert_as_expected(run, expected, request)


def forget_other_domains(controls: dict[str, Any]) -> None:
    """Leaves out what depends on all 72 domains, or on 64 dimensions at random."""
    for name in ("z_scored", "probe", "cka"):
        del controls[name]


def test_correlations_follow_from_the_files(saved: Path) -> None:
    document = written(saved / "demo.json")
    assert [trial["train"] for trial in document["trials"]] == list(TRAINS)
    for trial in document["trials"]:
        scores = written(saved / trial["train"] / "scores.json")
        domains = {domain["name"]: domain for domain in scores["domains"]}
        assert len(domains) == 72
        assert trial["domains"] == [name for name in domains if name != trial["train"]]
        for outcome in OUTCOMES:
            for predictor, keys in PREDICTORS.items():
                values = []
                for name in trial["domains"]:
                    value: Any = domains[name]
                    for key in keys:
                        value = value[key]
                    values.append(value)
                assert trial["r"][outcome][predictor] == pytest.approx(
                    pearsonr(values, trial["changes"][outcome]).statistic, abs=1e-9
                )
    for outcome, summary in document["summary"].items():
        for predictor, spread in summary.items():
            values = [trial["r"][outcome][predictor] for trial in document["trials"]]
            assert spread["mean_r"] == pytest.approx(np.mean(values))
            assert (spread["min_r"], spread["max_r"], spread["n"]) == (min(values), max(values), 2)
            assert spread["n_above_zero"] == sum(value > 0 for value in values)


def test_outcomes_are_those_of_a_model_really_trained(done: demo.Demo, saved: Path) -> None:
    model, tokenizer = organism.load_model()
    trial = done.trials[0]
    tuned = organism.fine_tune(model, tokenizer, organism.examples(trial.train, 512, seed=1000), seed=0)
    names = list(organism.DOMAINS)
    for shots in (0, 4):
        before, after = (organism.measure(one, tokenizer, names, shots=shots, n=64, seed=2) for one in (model, tuned))
        change = np.delete(after.p_correct - before.p_correct, names.index(trial.train))
        signed, size = (SIGNED, PRIMARY) if shots == 0 else (OUTCOMES[7], FEW_SHOT)
        np.testing.assert_allclose(trial.changes[signed], change)
        np.testing.assert_allclose(trial.changes[size], np.abs(change))
        if shots == 0:
            paired = np.exp(after.log_p) - np.exp(before.log_p)
            validation = written(saved / trial.train / "validation.json")
            assert [row["outcome"]["change"] for row in validation["domains"]] == pytest.approx(change)
            stderr = np.delete(paired.std(axis=1, ddof=1) / 8, names.index(trial.train))
            assert [row["outcome"]["stderr"] for row in validation["domains"]] == pytest.approx(stderr)
            assert trial.own_change == pytest.approx((after.p_correct - before.p_correct)[names.index(trial.train)])
    assert trial.own_change > 0.2


def test_the_same_seed_gives_the_same_demo(done: demo.Demo) -> None:
    again = demo.run_demo(trains=TRAINS[1:])
    assert again.to_dict()["trials"] == done.to_dict()["trials"][1:]


def test_the_library_holds_every_set(done: demo.Demo, library: Path) -> None:
    cross = sts_fast.cross(
        *([sts_fast.Profile.load(path) for path in sts_fast.Library(library) if f"-{kind}-" in path.name]
          for kind in ("train", "domain")),
        top_n=demo.TOP_N,
    )  # fmt: skip
    assert (len(cross.trains), len(cross.domains)) == (2, 72)
    for i, train in enumerate(cross.trains):
        scores = {
            domain.name: domain.scores["act"].value for domain in done.forecasts[train[len("train on ") :]].domains
        }
        assert cross.values["act"][i].tolist() == pytest.approx([scores[name] for name in cross.domains], rel=1e-10)


# ---- words


def test_findings_say_what_correlates_and_what_does_as_well() -> None:
    said = made_up([0.6, 0.4, 0.2], {"base loss": [0.5, 0.5, 0.5]}).findings()
    assert said[0].startswith(
        "STS_act goes with how much P(correct) changes: r = 0.40 on average over 3 trainings, from"
    )
    assert "0.20 to 0.60, above zero in 3 of 3" in said[0]
    assert said[1].startswith(
        "As good, and cheaper (in brackets: in how many of 3 trainings STS_act is ahead): base loss"
    )
    assert "base loss, r = 0.50 (1). " in said[1]
    assert "random features, r = −0.50 (3)" in said[2]
    assert "base loss" not in said[2]
    assert any("not direction" in sentence for sentence in said)


def test_findings_admit_that_nothing_correlates() -> None:
    said = made_up([0.1, -0.1, 0.0]).findings()
    assert said[0].startswith("STS_act does not reliably go with")
    assert "above zero in 1 of 3" in said[0]
    assert said[1].startswith("Behind it")


def test_a_predictor_that_does_not_vary_has_no_correlation() -> None:
    trials = made_up([0.3, 0.4])
    constant = replace(trials.trials[0], r={o: {**r, "base loss": None} for o, r in trials.trials[0].r.items()})
    spread = replace(trials, trials=[constant]).spread(PRIMARY, "base loss")
    assert spread.n == 0
    assert math.isnan(spread.mean)
    assert replace(trials, trials=[constant]).to_dict()["summary"][PRIMARY]["base loss"]["mean_r"] is None


# ---- files and page


def test_page_holds_the_numbers(saved: Path) -> None:
    document, page = written(saved / "demo.json"), read_page(saved / "report.html")
    text = page.text()
    assert all(finding in text for finding in document["findings"])
    rows = page.one("table", id="table-trials").one("tbody").all("tr")
    for row, trial in zip(rows, document["trials"], strict=True):
        assert row.one("a").attrs["href"] == f"{trial['train']}/report.html"
        assert (saved / row.one("a").attrs["href"]).is_file()
        assert [float(data.attrs["value"]) for data in row.all("data")] == list(trial["r"][PRIMARY].values())
    for figure, trial in zip(
        page.one("section", **{"aria-labelledby": "forecasts"}).all("figure"), document["trials"], strict=True
    ):
        r = trial["r"][PRIMARY]["STS_act"]
        assert figure.one("figcaption").text() == f"{trial['train']} r = {r:.2f}".replace("-", "−")
        assert len(figure.all("circle")) == len(trial["domains"])
    outcomes = page.one("table", id="table-outcomes").one("tbody").all("tr")
    for row, summary in zip(outcomes, document["summary"].values(), strict=True):
        assert [float(data.attrs["value"]) for data in row.all("data")] == [s["mean_r"] for s in summary.values()]
    assert "outcome" in {
        node.attrs["id"] for node in read_page(saved / TRAINS[0] / "report.html").all() if "id" in node.attrs
    }


def test_a_damaged_demo_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"demo\.json cannot be read .*run sts-fast demo again"):
        build_demo_report(tmp_path)
    (tmp_path / "demo.json").write_text("{")
    with pytest.raises(InputError, match=r"demo\.json cannot be read"):
        build_demo_report(tmp_path)


def test_the_documented_tables_are_those_of_the_results() -> None:
    root = Path(__file__).parents[2]
    table = runpy.run_path(str(root / "benchmarks" / "demo_table.py"))["table"]
    written_down = (root / "study" / "world" / "demo.md").read_text(encoding="utf-8")
    assert all(
        part in written_down for part in table(written(root / "benchmarks" / "results" / "demo.json")).split("\n\n")
    )


# ---- the command


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["sts-fast", "demo", *words])
    try:
        cli.main()
        code: Any = 0
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


def test_command_prints_forecast_outcome_and_controls(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], done: demo.Demo, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys.modules["sts_fast.cli.demo"], "run_demo", lambda **options: done)
    code, out, err = command(monkeypatch, capsys, "--output", str(tmp_path / "run"))
    assert code == 0
    trial = done.trials[0]
    first = max(trial.validation.domains, key=lambda row: row.score)
    assert f"{first.name}" in out
    assert f"{first.outcome.change:+.3f}" in out
    assert all(predictor in out for predictor in PREDICTORS)
    assert f"{trial.validation.size.pearson.value:.2f} [" in out
    assert all(" ".join(finding.split())[:60] in " ".join(out.split()) for finding in done.findings())
    assert err.strip() == f"Open {tmp_path / 'run' / 'report.html'}"
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"demo.json", "report.html", "run.yaml", *TRAINS}


def test_command_gives_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], done: demo.Demo, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys.modules["sts_fast.cli.demo"], "run_demo", lambda **options: done)
    code, out, _ = command(monkeypatch, capsys, "--json", "--output", str(tmp_path / "run"))
    assert code == 0
    assert json.loads(out) == written(tmp_path / "run" / "demo.json")


def test_retrain_makes_the_organism_beside_the_output_and_uses_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], done: demo.Demo, tmp_path: Path
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(organism, "train", lambda seed, folder, tell: seen.append((seed, folder)))
    monkeypatch.setattr(sys.modules["sts_fast.cli.demo"], "run_demo", lambda **options: seen.append(options) or done)
    code, _, _ = command(monkeypatch, capsys, "--retrain", "--seed", "3", "--heavy", "--output", str(tmp_path / "run"))
    assert code == 0
    assert seen[0] == (3, tmp_path / "run-organism")
    assert {name: seen[1][name] for name in ("seed", "heavy", "folder")} == {
        "seed": 3, "heavy": True, "folder": tmp_path / "run-organism",
    }  # fmt: skip


def test_an_organism_that_has_not_learnt_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    train = organism.train
    monkeypatch.setattr(organism, "train", lambda seed, folder, tell: train(seed, folder, tell, n_steps=2))
    code, out, err = command(monkeypatch, capsys, "--retrain", "--output", str(tmp_path / "run"))
    assert (code, out) == (2, "")
    assert err.startswith("error: the model of seed 0 answers ")
    assert "take another seed" in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("words", "message"), [
    (("--seeds", "0"), "--seeds"),
    (("--output", "."), "results need their own folder"),
    (("--output", "/proc/none/run"), "cannot write /proc/none/run"),
])  # fmt: skip
def test_wrong_options_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    code, out, err = command(monkeypatch, capsys, *words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_an_unknown_training_set_is_told() -> None:
    with pytest.raises(InputError, match=r"no domain 'T0\.sing\.a'"):
        demo.run_demo(trains=["T0.sing.a"])
