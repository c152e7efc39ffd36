"""Forecasts of the change itself: equations literally, coverage in simulations, and what is refused."""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from study.world import calibrate
from tiny import Tiny
from written_run import make_scores, make_signed

from sts_fast import Calibration, InputError, fit_calibration
from sts_fast.cli import main
from sts_fast.forecast.run import DomainScore, Forecast, ShiftedFeature, save_beside, validate_scores
from sts_fast.outcomes.calibration.conformal import (
    Points,
    assess,
    fit_constant,
    fit_line,
    held_out_residuals,
    multiplier,
    trains_needed,
)

ROLLOUTS = {
    **dict.fromkeys(
        (
            *("n_completions", "n_unrewarded", "n_groups", "n_lone", "n_settled", "n_empty", "n_truncated"),
            *("n_verified", "n_completions_read", "n_groups_read", "n_too_long", "mean_reward", "verified_reward"),
        ),
        9,
    ),
    **{"advantages": "recorded", "columns": {}, "overlaps": {}},
}


def world(n_trains: int, n_domains: int, seed: int, *, spread: float = 0.0, signed: bool = True) -> Points:
    """Changes that follow the scores with noise; `spread` is that of its log size over training sets."""
    rng = np.random.default_rng(seed)
    train = np.repeat(np.arange(n_trains), n_domains)
    score = rng.normal(size=n_trains * n_domains)
    noise = (0.05 + 0.1 * np.abs(score)) * np.exp(spread * rng.standard_normal(n_trains))[train]
    change = 0.3 * score + noise * rng.standard_normal(len(score))
    return Points(score, change, train, signed) if signed else Points(np.abs(score), np.abs(change), train, signed)


# ---- the equations, literally


def test_the_line_is_the_weighted_least_squares_line() -> None:
    points = world(5, 7, seed=1)
    extra = replace(points, score=points.score[:30], change=points.change[:30], train=points.train[:30])  # unequal sets
    weight = [1 / sum(other == one for other in extra.train.tolist()) for one in extra.train.tolist()]
    s, y = extra.score.tolist(), extra.change.tolist()
    slope = sum(w * a * b for w, a, b in zip(weight, s, y, strict=True)) / sum(
        w * a * a for w, a in zip(weight, s, strict=True)
    )
    line = fit_line(extra)
    assert (line.intercept, line.slope) == (0.0, pytest.approx(slope))
    residual = [abs(b - slope * a) for a, b in zip(s, y, strict=True)]
    design = np.stack([np.ones(len(s)), np.abs(s)], axis=1) * np.sqrt(weight)[:, None]
    floor, per_score = np.linalg.lstsq(design, np.asarray(residual) * np.sqrt(weight), rcond=None)[0]
    assert floor > 0
    assert per_score > 0
    assert (line.floor, line.per_score) == (pytest.approx(floor), pytest.approx(per_score))


@pytest.mark.parametrize(
    ("score", "change", "expected"),
    [
        ([0, 1, 2], [1, 3, 5], (1, 2)),
        ([1, 2, 3], [0, 2, 4], (0, (0 + 4 + 12) / (1 + 4 + 9))),  # least squares alone would start below zero
        ([1, 2, 3], [3, 2, 1], (2, 0)),  # and fall
    ],
)
def test_sizes_are_forecast_by_a_line_that_neither_falls_nor_starts_below_zero(
    score: list[float], change: list[float], expected: tuple[float, float]
) -> None:
    points = Points(np.asarray(score, float), np.asarray(change, float), np.zeros(3, np.int64), signed=False)
    line = fit_line(points)
    assert (line.intercept, line.slope) == pytest.approx(expected)


def test_residuals_are_those_of_a_line_fitted_without_the_training_set() -> None:
    points = world(4, 6, seed=2)
    found = held_out_residuals(points)
    for i in range(len(points.score)):
        line = fit_line(points.only(points.train != points.train[i]))
        expected = abs(points.change[i] - line.slope * points.score[i])
        expected /= line.floor + line.per_score * abs(points.score[i])
        assert found[i] == pytest.approx(expected)


@pytest.mark.parametrize(("n_trains", "level"), [(3, 0.5), (4, 0.5), (5, 0.8), (9, 0.9)])
def test_the_multiplier_equals_the_mean_over_all_draws_of_one_domain_for_each_training_set(
    n_trains: int, level: float
) -> None:
    rng = np.random.default_rng(n_trains)
    sets = [rng.exponential(size=2 + one % 2).tolist() for one in range(n_trains)]
    rank = math.ceil(level * (n_trains + 1) - 1e-9)

    def share(value: float) -> float:
        return float(np.mean([np.mean([r <= value for r in one]) for one in sets]))

    inside = float(np.mean([share(sorted(draw)[rank - 1]) for draw in itertools.product(*sets)]))
    expected = min(value for one in sets for value in one if share(value) >= inside - 1e-9)
    train = np.concatenate([[one] * len(values) for one, values in enumerate(sets)])
    assert multiplier(np.concatenate(sets), train, level) == expected


def test_with_one_domain_per_training_set_it_is_split_conformal_prediction() -> None:
    residuals = np.random.default_rng(0).exponential(size=30)
    assert multiplier(residuals, np.arange(30)) == np.sort(residuals)[math.ceil(0.9 * 31) - 1]


def test_nine_training_sets_are_needed() -> None:
    assert (trains_needed(0.9), trains_needed(0.5), trains_needed(0.95)) == (9, 1, 19)
    with pytest.raises(ValueError, match="9 training sets are needed, not 8"):
        multiplier(np.ones(16), np.repeat(np.arange(8), 2))


# ---- coverage, where it is known


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("spread", [0.0, 0.7])
@pytest.mark.parametrize(("n_trains", "n_domains"), [(9, 14), (12, 71), (30, 8)])
def test_intervals_hold_on_new_training_sets(n_trains: int, n_domains: int, spread: float, signed: bool) -> None:
    inside = []
    for seed in range(60):
        every = world(n_trains + 8, n_domains, seed=seed, spread=spread, signed=signed)
        past, new = every.only(every.train < n_trains), every.only(every.train >= n_trains)
        line = fit_line(past)
        half = multiplier(held_out_residuals(past), past.train) * line.scale(new.score)
        inside.append(np.mean(np.abs(new.change - line.change(new.score)) <= half))
    assert 0.88 < np.mean(inside) < 0.95


def test_the_assessment_tells_the_coverage_and_what_a_constant_would_reach() -> None:
    points = world(12, 40, seed=5)
    found = assess(points)
    assert found is not None
    assert 0.85 < found.coverage < 0.97
    assert found.coverage_range[0] <= found.coverage <= found.coverage_range[1]
    assert found.width < 0.8 * found.constant_width
    assert found.interval_score < 0.8 * found.constant_interval_score
    own = points.train == 3
    past, new = points.only(~own), points.only(own)
    line, half = fit_constant(past), multiplier(held_out_residuals(past, fit_constant), past.train)
    assert line.change(new.score) == pytest.approx(np.full(40, past.change.mean()))
    assert line.scale(new.score) == pytest.approx(np.full(40, np.abs(past.change - past.change.mean()).mean()))
    assert half > 1
    assert assess(points.only(points.train < 9)) is None


# ---- past runs in folders


def put_run(folder: Path, number: int, *, slope: float = 0.05, edit: Any = None, outcomes: bool = True) -> Path:
    """A run on training set `number`, whose domains changed by about slope * score by act."""
    scores = make_scores(6, seed=number)
    scores["provenance"]["inputs"][0]["sha256"] = f"{number:064x}"
    if edit is not None:
        edit(scores)
    folder.mkdir(parents=True)
    (folder / "scores.json").write_text(json.dumps(scores))
    if outcomes:
        rng = np.random.default_rng([number, 9])
        domains = [
            {
                "name": domain["name"],
                "score": domain["scores"]["act"]["value"],
                "outcome": {
                    "change": (slope * domain["scores"]["act"]["value"] + rng.normal() * 0.02),
                    "metric": "acc,none",
                },
            }
            for domain in scores["domains"]
        ]
        save_beside(folder, "validation.json", {"domains": domains})
    return folder


@pytest.fixture
def past(tmp_path: Path) -> Path:
    for number in range(11):
        put_run(tmp_path / "past" / f"run-{number}", number)
    return tmp_path / "past"


def made_forecast(seed: int, edit: Any = None) -> Forecast:
    """What make_scores writes, as a forecast in memory."""
    scores = make_scores(6, seed=seed)
    if edit is not None:
        edit(scores)
    domains = [DomainScore.from_plain(domain) for domain in scores.pop("domains")]
    features = [ShiftedFeature(**one) for one in scores.pop("shifted_features")]
    nothing: Any = None
    plain = {field.name: scores[field.name] for field in fields(Forecast) if field.name in scores}
    return Forecast(
        **plain, domains=domains, shifted_features=features, means=nothing, controls={}, prompts=nothing,
        firings=nothing,
    )  # fmt: skip


def test_a_calibration_is_learned_saved_read_and_applied(past: Path, tmp_path: Path) -> None:
    calibration = fit_calibration(past)
    assert (calibration.estimator, calibration.unit, calibration.signed) == ("act", "accuracy", False)
    assert (calibration.n_trains, len(calibration.runs)) == (11, 11)
    assert calibration.line.slope == pytest.approx(0.05, abs=0.01)
    assert calibration.assessment is not None
    calibration.save(tmp_path / "calibration.json")
    assert Calibration.load(tmp_path / "calibration.json") == calibration

    forecast = calibration.apply(made_forecast(99))
    document = forecast.to_dict()
    validate_scores(document)
    assert document["calibration"]["n_trains"] == 11
    for domain in document["domains"]:
        low, high = domain["change_interval"]
        assert 0 <= low < domain["change"] < high
        assert domain["change"] == pytest.approx(0.05 * domain["scores"]["act"]["value"], abs=0.03)
        half = calibration.multiplier * (
            calibration.line.floor + calibration.line.per_score * domain["scores"]["act"]["value"]
        )
        assert high - domain["change"] == pytest.approx(half)


def test_trainings_on_one_set_are_one_training_set(past: Path) -> None:
    put_run(past / "again", 3, slope=0.06)
    calibration = fit_calibration([past / "again", past])
    assert (calibration.n_trains, len(calibration.runs)) == (11, 12)


def test_signed_scores_give_changes_with_a_sign(tmp_path: Path) -> None:
    def signed(scores: dict[str, Any]) -> None:
        rng = np.random.default_rng(len(str(scores["shifted_features"])))
        scores["signed"] = make_signed(scores)
        for domain, value in zip(scores["domains"], rng.normal(size=len(scores["domains"])).tolist(), strict=True):
            domain["scores"]["adapter"] = {"value": value, "ci": [value - 0.1, value + 0.1]}
            domain["scores"]["act"]["value"] = value  # what put_run makes changes from

    def repaired(scores: dict[str, Any]) -> None:
        signed(scores)
        for domain in scores["domains"]:
            domain["scores"]["act"]["value"] = abs(domain["scores"]["act"]["value"])

    for number in range(10):
        folder = put_run(tmp_path / "past" / str(number), number, slope=0.1, edit=signed)
        scores = json.loads((folder / "scores.json").read_text())
        repaired(scores)
        (folder / "scores.json").write_text(json.dumps(scores))
        measured = json.loads((folder / "validation.json").read_text())
        save_beside(folder, "validation.json", {"domains": measured["domains"]})
    calibration = fit_calibration(tmp_path / "past")
    assert (calibration.estimator, calibration.signed) == ("adapter", True)
    assert calibration.line.intercept == 0
    assert calibration.line.slope == pytest.approx(0.1, abs=0.02)
    applied = calibration.apply(made_forecast(3, repaired)).to_dict()
    assert {np.sign(domain["change"]) for domain in applied["domains"]} == {-1, 1}
    for domain in applied["domains"]:
        assert domain["change"] == pytest.approx(calibration.line.slope * domain["scores"]["adapter"]["value"])


# ---- what is refused


def test_too_few_training_sets_are_refused_with_the_number_needed(tmp_path: Path) -> None:
    for number in range(8):
        put_run(tmp_path / "past" / str(number), number)
    for again in range(3):
        put_run(tmp_path / "past" / f"again-{again}", again)
    with pytest.raises(InputError, match="90% needs past runs on 9 different training sets, but only 8"):
        fit_calibration(tmp_path / "past")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda scores: scores["model"].update(name="models/other"), "model models/other"),
        (lambda scores: scores["sae"].update(source="saes/of/another"), "SAE saes/of/another instead of"),
        (lambda scores: scores["model"].update(module="layers.5"), "place output of layers.5"),
        (lambda scores: scores.update(rollouts=ROLLOUTS), "forecast of RL instead of fine-tuning"),
        (lambda scores: scores["settings"].update(shots=4), "--shots 4 instead of 2"),
        (lambda scores: scores["settings"].update(top_n=7), "--top-n 7"),
    ],
)
def test_runs_that_were_made_otherwise_are_refused(past: Path, edit: Any, message: str) -> None:
    calibration = fit_calibration(past)
    with pytest.raises(InputError, match=f"other settings: .*{message}"):
        calibration.apply(made_forecast(5, edit))
    put_run(past / "strange", 50, edit=edit)
    with pytest.raises(InputError, match=f"differs from .*{message}"):
        fit_calibration(past)


def test_settings_that_the_scores_do_not_depend_on_may_differ(past: Path) -> None:
    def edit(scores: dict[str, Any]) -> None:
        scores["settings"].update(limit=99, domain_shots=7)
        scores["model"]["name"] = "elsewhere/a-model"
        scores["provenance"]["inputs"][0]["path"] = "elsewhere/set.jsonl"

    def local(scores: dict[str, Any]) -> None:
        scores["provenance"]["inputs"].append(
            {"role": "model", "path": f"{scores['model']['name']}/model.safetensors", "sha256": "12" * 32}
        )

    calibration = fit_calibration(past)
    calibration.apply(made_forecast(5, lambda scores: scores["settings"].update(limit=99, domain_shots=7)))
    for number in range(20, 30):
        put_run(past.parent / "local" / str(number), number, edit=local)
    moved = fit_calibration(past.parent / "local")
    moved.apply(made_forecast(5, lambda scores: (edit(scores), local(scores))))


def test_outcomes_of_two_kinds_are_refused(past: Path) -> None:
    path = past / "run-4" / "validation.json"
    path.write_text(path.read_text().replace("acc,none", "exact_match,strict-match"))
    assert fit_calibration(past).unit == "accuracy"
    path.write_text(path.read_text().replace("exact_match,strict-match", "word_perplexity,none"))
    with pytest.raises(InputError, match=r"of different kinds \(accuracy in .*, word_perplexity in .*run-4\)"):
        fit_calibration(past)


def test_scores_beyond_those_learned_from_get_no_interval_and_most_of_them_a_refusal(past: Path) -> None:
    calibration = fit_calibration(past)

    def scaled(factor: float, first: int) -> Any:
        def edit(scores: dict[str, Any]) -> None:
            for domain in scores["domains"][:first]:
                domain["scores"]["act"]["value"] = factor * calibration.largest

        return edit

    applied = calibration.apply(made_forecast(5, scaled(1.5, 1))).to_dict()
    assert applied["domains"][0]["change_interval"] is None
    assert applied["domains"][0]["change"] == pytest.approx(calibration.change(1.5 * calibration.largest))
    assert applied["domains"][1]["change_interval"] is not None
    assert any("domain 0 (1.50 times)" in warning for warning in applied["calibration"]["warnings"])
    with pytest.raises(InputError, match=r"4 of 6 scores exceed the largest .* the median 2\.0 times as large"):
        calibration.apply(made_forecast(5, scaled(2.0, 4)))


def test_domains_not_learned_from_are_named(past: Path) -> None:
    calibration = fit_calibration(past)
    forecast = made_forecast(5, lambda scores: scores["domains"][0].update(name="juggling"))
    assert any("learned without juggling" in text for text in calibration.apply(forecast).calibration["warnings"])


def test_a_forecast_without_the_estimator_is_refused(past: Path) -> None:
    calibration = replace(fit_calibration(past), estimator="adapter_loss")
    with pytest.raises(InputError, match="learned from 'adapter_loss': score with --estimators adapter"):
        calibration.apply(made_forecast(5))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda past: (past / "run-0" / "validation.json").write_text("{"), "validate the run again"),
        (lambda past: (past / "run-0" / "validation.json").write_text('{"domains": [{"name": "a"}]}'), "validate the"),
        (
            lambda past: (past / "run-0" / "validation.json").write_text(
                re.sub('"change": [^,]*', '"change": NaN', (past / "run-0" / "validation.json").read_text(), count=1)
            ),
            "the change of '.*' in .* is nan",
        ),
        (lambda past: (past / "run-0" / "scores.json").write_text('{"domains": []}'), "without a schema version"),
        (
            lambda past: (past / "run-0" / "scores.json").write_text(
                (past / "run-0" / "scores.json")
                .read_text()
                .replace('"act": {"value": ', '"act": {"value": "much", "was": ')
            ),
            r"domains\[0\]\.scores\.act.*make the run again",
        ),
        (lambda past: [one.unlink() for one in past.glob("*/validation.json")], "none of 11 past runs has an outcome"),
        (lambda past: [one.unlink() for one in past.glob("*/scores.json")], "contains no past run"),
    ],
)
def test_damaged_runs_are_told_by_name(past: Path, damage: Any, message: str) -> None:
    damage(past)
    with pytest.raises(InputError, match=message):
        fit_calibration(past)


def test_an_outcome_of_another_run_teaches_nothing(past: Path) -> None:
    (past / "run-0" / "scores.json").write_bytes((past / "run-1" / "scores.json").read_bytes())
    with pytest.raises(InputError, match=r"run-0/validation\.json belongs to another run than scores\.json beside it"):
        fit_calibration(past)


def test_what_a_killed_run_left_is_not_read(past: Path) -> None:
    before = fit_calibration(past).to_dict()
    killed = put_run(past / ".run.0123456789abcdef.tmp", 40)
    (killed / "scores.json").write_text("{")
    assert fit_calibration(past).to_dict() == before


def test_runs_without_an_outcome_are_left_out_and_named(past: Path) -> None:
    put_run(past / "young", 40, outcomes=False)
    assert any("without an outcome: " in text and "young" in text for text in fit_calibration(past).warnings)


def test_outcomes_of_evaluations_that_do_not_match_are_named(past: Path) -> None:
    for number in (3, 5):
        path = past / f"run-{number}" / "validation.json"
        said = {
            "mismatches": [f"before and after were evaluated differently: limit is {number} before"],
            "warnings": [],
        }
        path.write_text(json.dumps(json.loads(path.read_text()) | said))
    (said_once,) = [text for text in fit_calibration(past).warnings if "do not match" in text]
    assert "run-3, " in said_once
    assert "run-5, such as: before and after were evaluated differently: limit is 3 before;" in said_once


def test_asking_for_what_is_not_there_is_refused(past: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no scores by 'ntk'"):
        fit_calibration(past, estimator="ntk")
    with pytest.raises(InputError, match=r"must be one of act, .*, not 'nkt'"):
        fit_calibration(past, estimator="nkt")
    with pytest.raises(InputError, match="there is no folder"):
        fit_calibration(tmp_path / "nowhere")
    with pytest.raises(InputError, match="there is no calibration"):
        Calibration.load(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    "edit",
    [
        lambda document: document.pop("line"),
        lambda document: document.update(estimator="guess"),
        lambda document: document["line"].update(slope="1"),
        lambda document: document.update(multiplier=-1),
        lambda document: document.update(schema_version="2.0"),
        lambda document: document.update(extra=1),
    ],
)
def test_a_file_that_is_no_calibration_is_refused(past: Path, tmp_path: Path, edit: Any) -> None:
    document = copy.deepcopy(fit_calibration(past).to_dict())
    assert document["line"] == asdict(fit_calibration(past).line)
    edit(document)
    (tmp_path / "bad.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"bad\.json is not a calibration"):
        Calibration.load(tmp_path / "bad.json")


def test_the_written_tables_are_those_of_the_results() -> None:
    results = json.loads(calibrate.RESULTS.read_text(encoding="utf-8"))
    assert calibrate.TABLES.read_text(encoding="utf-8") == calibrate.tables(results)


# ---- on the command line, and in the report


def run_main(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr("sys.argv", ["sts-fast", *map(str, words)])
    try:
        main()
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def test_the_command_line_learns(
    past: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cal.json"
    assert run_main(monkeypatch, "validate", "--fit", past, "--output", file) == 0
    printed = capsys.readouterr().out
    calibration = Calibration.load(file)
    assert printed.rstrip("\n") == calibration.to_text()
    assert "Learned from 11 runs on 11 training sets: 66 changes, in points of accuracy" in printed
    assert f"{calibration.assessment.coverage:.0%}" in printed  # type: ignore[union-attr]
    runs = sorted(past.iterdir())
    assert run_main(monkeypatch, "validate", "--fit", *runs, "--output", file, "--json") == 0
    assert Calibration.load(file) == calibration
    assert json.loads(capsys.readouterr().out) == calibration.to_dict()
    for words, message in (
        (("--fit", *runs[:5]), "on 9 different training sets, but only 5"),
        (("--fit", past, "--before", "x.csv"), "validate each run first"),
        ((*runs[:2], "--before", "x.csv"), "one run, or --fit"),
        ((runs[0],), "--before is missing"),
    ):
        assert run_main(monkeypatch, "validate", *words) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert message in line


def learned_for(tiny: Tiny, run: Path, tmp_path: Path, edit: Any = None) -> Path:
    """A calibration as if learned from ten runs like the one in `run`, with other training sets."""
    scores = json.loads((run / "scores.json").read_text())
    for number in range(10):
        rng = np.random.default_rng(number)
        one = copy.deepcopy(scores)
        for entry in one["provenance"]["inputs"]:
            if entry["role"] == "train":
                entry["sha256"] = f"{number:064x}"
        for domain in one["domains"]:
            domain["scores"]["act"]["value"] *= float(rng.uniform(0.2, 3))
        if edit is not None:
            edit(one)
        folder = tmp_path / "past" / str(number)
        folder.mkdir(parents=True)
        (folder / "scores.json").write_text(json.dumps(one))
        domains = [
            {
                "name": d["name"],
                "outcome": {"change": -0.1 * d["scores"]["act"]["value"] + rng.normal() * 0.001, "metric": "acc"},
            }
            for d in one["domains"]
        ]
        save_beside(folder, "validation.json", {"domains": domains})
    fit_calibration(tmp_path / "past").save(tmp_path / "cal.json")
    return tmp_path / "cal.json"


def test_score_and_compare_apply_it(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words: list[object] = ["--model", tiny.model, "--sae", tiny.saes["topk"]]
    for name, path in tiny.domains.items():
        words += ["--domains", f"{name}={path}"]
    words += ["--shots", 1, "--domain-shots", 1, "--limit", 8, "--top-n", 8, "--estimators", "act"]
    run = tmp_path / "run"
    assert run_main(monkeypatch, "score", *words, "--train", tiny.train, "--output", run) == 0
    file = learned_for(tiny, run, tmp_path)
    calibration = Calibration.load(file)
    words += ["--calibration", file]
    capsys.readouterr()
    assert run_main(monkeypatch, "score", *words, "--train", tiny.train, "--output", run, "--overwrite") == 0
    printed = capsys.readouterr().out
    said = "Forecast size of change (its direction is not known), in points of accuracy"
    assert said in " ".join(printed.split())
    scores = json.loads((run / "scores.json").read_text())
    validate_scores(scores)
    page = (run / "report.html").read_text()
    for domain in scores["domains"]:
        assert domain["change"] == pytest.approx(calibration.change(domain["scores"]["act"]["value"]))
        assert domain["change_interval"] == pytest.approx(calibration.interval(domain["scores"]["act"]["value"]))
        shown = f"{100 * domain['change']:.1f}"
        assert shown in printed
        assert f">{shown}</data>" in page
    assert [entry["path"] for entry in scores["provenance"]["inputs"] if entry["role"] == "calibration"] == [str(file)]

    both = [*words, "--train", f"a={tiny.train}", "--train", f"b={tiny.domains['days']}", "--output", tmp_path / "both"]
    assert run_main(monkeypatch, "compare", *both) == 0
    comparison = json.loads((tmp_path / "both" / "compare.json").read_text())
    changes = comparison["changes"]["trains"]
    assert changes["a"]["value"] == pytest.approx([domain["change"] for domain in scores["domains"]])
    assert set(changes) == {"a", "b"}
    capsys.readouterr()

    for changed, message in (
        ({"--top-n": 9}, "--top-n 9 instead of 8"),
        ({"--estimators": "icl"}, "was learned from 'act': add act to --estimators"),
        ({"--calibration": tmp_path / "none.json"}, "there is no calibration"),
    ):
        asked = list(words)
        for option, value in changed.items():
            asked[asked.index(option) + 1] = value
        assert run_main(monkeypatch, "score", *asked, "--train", tiny.train, "--output", tmp_path / "no") == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "no" / "scores.json").exists()  # told before any work
    asked = list(words)
    asked[asked.index("--sae") + 1] = tiny.saes["jumprelu"]
    assert run_main(monkeypatch, "score", *asked, "--train", tiny.train, "--output", tmp_path / "no") == 2
    assert "the scores without changes are in" in capsys.readouterr().err
    assert json.loads((tmp_path / "no" / "scores.json").read_text())["calibration"] is None
