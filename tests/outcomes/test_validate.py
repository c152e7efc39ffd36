from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import special, stats
from written_run import make_scores, write_scores

from sts_fast.errors import InputError
from sts_fast.forecast.run import DomainScore, Forecast
from sts_fast.outcomes.outcomes import Outcome, Outcomes
from sts_fast.outcomes.validate import Validation, outcome_limits, validate
from sts_fast.outcomes.validate.record import Association, Limits

ASSETS = Path(__file__).parents[3] / "shared" / "assets"
needs_assets = pytest.mark.skipif(not ASSETS.is_dir(), reason="the real evaluation results are not on this machine")

# Change of accuracy of Qwen2.5-7B after training on LIMO, from the notebook of the STS paper's authors.
PUBLISHED = {
    "engineering": 0.0980, "chemistry": 0.0636, "physics": 0.0524, "computer science": 0.0488, "other": 0.0130,
    "psychology": 0.0037, "history": 0.0026, "law": 0.0019,
}  # fmt: skip


def made_up(n: int, seed: int = 0, stderr: float | None = 0.02) -> tuple[dict[str, Any], dict[str, Outcome]]:
    """Scores with intervals, and changes of either sign, of n domains."""
    rng = np.random.default_rng(seed)
    scores, outcomes = {}, {}
    for i in range(n):
        change = float(rng.normal(0, 0.05))
        value = float(5 + 10 * abs(change) + rng.normal(0, 0.3))
        scores[f"d{i}"] = (value, value - 0.2, value + 0.2)
        outcomes[f"d{i}"] = Outcome(change, stderr=stderr)
    return scores, outcomes


def arrays(scores: dict[str, Any], outcomes: dict[str, Outcome]) -> tuple[Any, Any, Any]:
    return (
        np.asarray([scores[name][0] for name in outcomes]),
        np.asarray([outcome.change for outcome in outcomes.values()]),
        np.asarray([outcome.stderr for outcome in outcomes.values()], float),
    )


@pytest.mark.parametrize("n", [5, 8, 14, 40])
def test_statistics_equal_scipy(n: int) -> None:
    scores, outcomes = made_up(n, seed=n)
    s, d, _ = arrays(scores, outcomes)
    result = validate(scores, outcomes)
    for association, target in ((result.size, np.abs(d)), (result.signed, d)):
        line = stats.linregress(s, target)
        assert association.pearson.value == pytest.approx(stats.pearsonr(s, target).statistic)
        assert association.spearman.value == pytest.approx(stats.spearmanr(s, target).statistic)
        assert association.r_squared.value == pytest.approx(line.rvalue**2)
        for name, statistic in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
            left = [statistic(np.delete(s, i), np.delete(target, i)).statistic for i in range(n)]
            assert getattr(association, name).leave_one_out == pytest.approx((min(left), max(left)))


def test_ties_get_their_mean_rank() -> None:
    s, d = [1.0, 2, 2, 3, 5, 5], [0.1, 0.2, 0.3, 0.3, 0.1, 0.4]
    result = validate(dict(enumerate_names(s)), {k: Outcome(v) for k, v in enumerate_names(d)})
    assert result.size.spearman.value == pytest.approx(stats.spearmanr(s, d).statistic)


def enumerate_names(values: list[float]) -> list[tuple[str, float]]:
    return [(f"d{i}", value) for i, value in enumerate(values)]


@pytest.mark.parametrize("n", [5, 6])
def test_exact_permutation_p_equals_scipy(n: int) -> None:
    scores, outcomes = made_up(n, seed=3)
    s, d, _ = arrays(scores, outcomes)
    result = validate(scores, outcomes)
    assert result.exact_permutation
    for name, statistic in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
        estimate = getattr(result.size, name)
        for value, tail in ((estimate.p_one_sided, "greater"), (estimate.p_two_sided, None)):
            expected = stats.permutation_test(
                (s,),
                lambda x, f=statistic, t=tail: f(x, np.abs(d)).statistic if t else abs(f(x, np.abs(d)).statistic),
                permutation_type="pairings",
                alternative="greater",
                n_resamples=np.inf,
            )
            assert value == pytest.approx(expected.pvalue)
    assert result.size.r_squared.p_one_sided == result.size.pearson.p_two_sided


def test_random_permutation_p_is_near_the_t_test_and_never_zero() -> None:
    rng = np.random.default_rng(5)
    s, d = rng.normal(size=(2, 30))
    d += 0.4 * s
    result = validate(dict(enumerate_names(s.tolist())), {k: Outcome(v) for k, v in enumerate_names(d.tolist())})
    assert not result.exact_permutation
    expected = stats.pearsonr(s, d, alternative="greater").pvalue
    assert 0.01 < expected < 0.2
    # Four standard deviations of the share in 10,000 draws.
    assert result.signed.pearson.p_one_sided == pytest.approx(expected, abs=4 * math.sqrt(expected / 10_000) + 0.005)
    perfect = validate({k: Outcome(abs(v)).change for k, v in enumerate_names(d.tolist())},
                       {k: Outcome(v) for k, v in enumerate_names(d.tolist())})  # fmt: skip
    assert perfect.size.pearson.p_one_sided == pytest.approx(1 / 10_001)


def test_interval_measured_again_is_the_literal_bootstrap() -> None:
    scores, outcomes = made_up(10, seed=1)
    s, d, stderr = arrays(scores, outcomes)
    result = validate(scores, outcomes)
    rng = np.random.default_rng(123)
    draws: dict[str, list[float]] = {"pearson": [], "spearman": [], "r_squared": []}
    signed = []
    for _ in range(2000):
        s_new = rng.normal(s, 0.4 / (2 * stats.norm.ppf(0.975)))
        d_new = rng.normal(d, stderr)
        draws["pearson"].append(stats.pearsonr(s_new, np.abs(d_new)).statistic)
        draws["spearman"].append(stats.spearmanr(s_new, np.abs(d_new)).statistic)
        draws["r_squared"].append(draws["pearson"][-1] ** 2)
        signed.append(stats.pearsonr(s_new, d_new).statistic)
    for name, values in draws.items():
        assert getattr(result.size, name).ci == pytest.approx(tuple(np.percentile(values, [2.5, 97.5])), abs=0.05)
    assert result.signed.pearson.ci == pytest.approx(tuple(np.percentile(signed, [2.5, 97.5])), abs=0.05)
    assert result.ci_carries == "the outcomes and the scores"


def test_interval_over_domains_is_the_literal_bootstrap() -> None:
    scores, outcomes = made_up(12, seed=2)
    s, d, _ = arrays(scores, outcomes)
    result = validate(scores, outcomes)
    expected = stats.bootstrap(
        (s, np.abs(d)), lambda x, y: stats.pearsonr(x, y).statistic, paired=True, method="percentile",
        n_resamples=2000, rng=np.random.default_rng(0), vectorized=False,
    ).confidence_interval  # fmt: skip
    assert result.size.pearson.ci_domains == pytest.approx((expected.low, expected.high), abs=0.05)
    # The noise of the evaluation comes with each domain and is not added: standard errors do not matter here.
    louder = {name: Outcome(outcome.change, stderr=1.0) for name, outcome in outcomes.items()}
    assert validate(scores, louder).size.pearson.ci_domains == result.size.pearson.ci_domains


def test_intervals_widen_with_either_noise_and_vanish_without() -> None:
    def width(association: Association) -> float:
        assert association.pearson.ci is not None
        return association.pearson.ci[1] - association.pearson.ci[0]

    scores, outcomes = made_up(10)
    bare = {name: value[0] for name, value in scores.items()}
    unknown = {name: Outcome(outcome.change) for name, outcome in outcomes.items()}
    both, one, other = validate(scores, outcomes), validate(bare, outcomes), validate(scores, unknown)
    assert width(both.size) > max(width(one.size), width(other.size))
    assert (one.ci_carries, other.ci_carries) == ("the outcomes", "the scores")
    neither = validate(bare, unknown)
    assert neither.size.pearson.ci is None
    assert "best case" in neither.verdict
    assert (neither.limits.reliability, neither.limits.ceiling, neither.limits.n_distinguishable) == (None, None, None)
    assert any("no standard error" in warning for warning in neither.warnings)


@pytest.mark.parametrize("n", [4, 8, 14])
def test_chance_of_a_random_forecast_equals_the_t_test(n: int) -> None:
    _, outcomes = made_up(n)
    limits = outcome_limits(outcomes)
    t = 0.7 * math.sqrt((n - 2) / (1 - 0.7**2))
    assert limits.chance_above_good == pytest.approx(stats.t.sf(t, n - 2), abs=1e-6)
    critical = limits.critical_r
    assert stats.t.sf(critical * math.sqrt((n - 2) / (1 - critical**2)), n - 2) == pytest.approx(0.05, abs=1e-6)


def test_reliability_equals_the_moments_of_a_folded_normal() -> None:
    _, outcomes = made_up(9, seed=4)
    _, d, stderr = arrays({name: (0,) for name in outcomes}, outcomes)
    mean = stderr * np.sqrt(2 / np.pi) * np.exp(-((d / stderr) ** 2) / 2) + d * special.erf(d / stderr / np.sqrt(2))
    noise = d**2 + stderr**2 - mean**2
    expected = 1 - np.mean(noise) / np.var(np.abs(d), ddof=1)
    assert outcome_limits(outcomes).reliability == pytest.approx(expected)
    noiseless = {name: Outcome(outcome.change, stderr=0.0) for name, outcome in outcomes.items()}
    limits = outcome_limits(noiseless)
    assert limits.reliability == 1.0
    assert limits.ceiling == pytest.approx(1.0)
    assert limits.n_distinguishable == 9


def test_power_is_the_literal_simulation() -> None:
    _, outcomes = made_up(10, seed=6)
    _, d, stderr = arrays({name: (0,) for name in outcomes}, outcomes)
    rng = np.random.default_rng(0)
    z = stats.zscore(np.abs(d))
    hits = []
    for _ in range(2000):
        forecast = 0.7 * z + math.sqrt(1 - 0.49) * rng.normal(size=10)
        hits.append(stats.pearsonr(forecast, np.abs(rng.normal(d, stderr)), alternative="greater").pvalue < 0.05)
    assert outcome_limits(outcomes).power == pytest.approx(np.mean(hits), abs=0.03)


# ---- what is said


def test_verdicts() -> None:
    rng = np.random.default_rng(0)
    changes = [(-1) ** i * 0.01 * i for i in range(16)]
    clear = {k: Outcome(v, stderr=0.002) for k, v in enumerate_names(changes)}
    noisy = {k: Outcome(v, stderr=0.08) for k, v in enumerate_names(changes)}
    right = {k: abs(v) for k, v in enumerate_names(changes)}
    useless = dict(enumerate_names(rng.permutation([abs(v) for v in changes]).tolist()))
    assert validate(right, clear).verdict.startswith("The score orders the 16 domains by size of change better than")
    assert "still weak evidence" in validate(right, noisy).verdict
    assert validate(useless, clear).verdict.startswith("The score is no better than chance")
    verdict = validate(useless, noisy).verdict
    assert verdict.startswith("These outcomes cannot tell a good forecast from a useless one (")
    assert "of 16 changes cannot be told from zero, 16 domains are few)" in verdict


def test_a_result_that_hangs_on_one_domain_is_called_so() -> None:
    said = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        s, d = rng.normal(size=(2, 14))
        d = np.abs(d) + 0.4 * s + 3
        result = validate(dict(enumerate_names(s.tolist())), {k: Outcome(v) for k, v in enumerate_names(d.tolist())})
        left = [stats.pearsonr(np.delete(s, i), np.delete(d, i), alternative="greater") for i in range(14)]
        worst = int(np.argmin([one.statistic for one in left]))
        hangs = result.size.pearson.p_one_sided < 0.05 and left[worst].pvalue > 0.05
        assert (f"This depends on d{worst}: without it r is {left[worst].statistic:.2f}" in result.verdict) == hangs
        said.append(hangs)
    assert len(set(said)) == 2


def test_output_is_the_same_for_a_seed_and_plain() -> None:
    scores, outcomes = made_up(9)
    first, again, other = (validate(scores, outcomes, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.to_text() == again.to_text()
    assert first.size.pearson.ci != other.size.pearson.ci
    assert first.size.pearson.value == other.size.pearson.value
    document = first.to_dict()
    assert document == json.loads(json.dumps(document, allow_nan=False))
    assert document["size"]["pearson"]["value"] == first.size.pearson.value
    assert document["domains"][0]["outcome"]["stderr"] == 0.02
    assert max(map(len, first.to_text().splitlines())) <= 79


def run_folder(folder: Path, domains: list[dict[str, Any]]) -> Path:
    counts = {key: value for key, value in make_scores(1)["domains"][0].items() if key not in ("scores", "controls")}
    return write_scores(folder, make_scores(0) | {"domains": [counts | domain for domain in domains]})


def run_domains() -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [
        {
            "name": name,
            "scores": {
                "act": {
                    "value": 1 + 10 * change + 0.2 * rng.random(),
                    "ci": [1 + 10 * change - 0.1, 1 + 10 * change + 0.3],
                },
                "icl": {"value": 2.0 + rng.random(), "ci": [1.0, 4.0]},
            },
            "controls": {
                "random": {"act": rng.random(), "icl": 1.0},
                "best": {"act": change, "icl": None},
                "base": {"loss": rng.random()},
                "cosine": rng.random() if name != "law" else None,
            },
        }
        for name, change in PUBLISHED.items()
    ]


def test_a_run_is_read_with_its_controls(tmp_path: Path) -> None:
    domains = run_domains()
    run = run_folder(tmp_path / "run", domains)
    outcomes = {name.replace(" ", "_"): Outcome(change, stderr=0.02) for name, change in PUBLISHED.items()}
    result = validate(run, outcomes)
    assert [row.name for row in result.domains] == list(PUBLISHED)
    assert result.domains[0].score_ci == tuple(domains[0]["scores"]["act"]["ci"])
    # 'cosine' is not there for every domain.
    assert list(result.controls) == ["random", "best", "base loss"]
    change = list(PUBLISHED.values())
    for name, values in (
        ("random", [domain["controls"]["random"]["act"] for domain in domains]),
        ("base loss", [domain["controls"]["base"]["loss"] for domain in domains]),
    ):
        assert result.controls[name].pearson.value == pytest.approx(stats.pearsonr(values, change).statistic)
        assert result.controls[name].spearman.value == pytest.approx(stats.spearmanr(values, change).statistic)
    assert "Controls do as well: best (1.00)." in result.verdict
    assert "r of best" in result.to_text()
    # For icl the random control is the same everywhere, and 'best' is missing.
    assert list(validate(run / "scores.json", outcomes, estimator="icl").controls) == ["base loss"]
    assert validate(json.loads((run / "scores.json").read_text()), outcomes) == result


def test_a_forecast_is_read_like_its_run() -> None:
    counts: dict[str, Any] = dict.fromkeys(
        ("n_tokens", "n_pairs", "n_skipped", "n_too_long", "n_unanswered", "n_special", "n_straddling", "n_sinks"), 0
    )
    counts |= {"n_prompts": 9, "demonstrations": []}
    domains = [DomainScore.from_plain({**counts, **domain}) for domain in run_domains()]
    nothing: Any = None
    train, settings, shift = {"n_prompts": 9}, {"estimators": ["act"]}, {"stability": {"mean_overlap": 1.0}}
    forecast = Forecast({}, {}, train, settings, shift, {}, domains, [], [], {}, nothing, nothing, nothing, nothing)
    assert validate(forecast, published()) == validate({"domains": run_domains()}, published())


def test_before_and_after_are_read_and_what_is_left_out_is_named(tmp_path: Path) -> None:
    for file, shift in (("a.csv", 0.0), ("b.csv", 1.0)):
        rows = [f"{name},{0.3 + shift * change},0.01\n" for name, change in PUBLISHED.items() if name != "law"]
        (tmp_path / file).write_text("domain,accuracy,stderr\n" + "".join(rows) + "biology,.5,.01\n")
    run = run_folder(tmp_path / "run", run_domains())
    result = validate(run, before=tmp_path / "a.csv", after=tmp_path / "b.csv")
    assert len(result.domains) == 7
    assert "left out, without an outcome: law; without a score: biology" in result.warnings
    assert any(warning.startswith("unpaired standard errors") for warning in result.warnings)


# ---- given the text of the questions


def with_texts(scores: Any, texts: dict[str, Any]) -> dict[str, Any]:
    """A run with these scores by domain, each with text controls of one number."""
    return {
        "domains": [
            {
                "name": f"d{i}",
                "scores": {"act": {"value": value, "ci": [value - 0.01, value + 0.01]}},
                "controls": {name: {"share": values[i]} for name, values in texts.items()},
            }
            for i, value in enumerate(np.asarray(scores, float).tolist())
        ]
    }


def outcomes_from(changes: Any) -> dict[str, Outcome]:
    return {f"d{i}": Outcome(change, stderr=0.005) for i, change in enumerate(np.asarray(changes, float).tolist())}


def residual_r(x: Any, y: Any, z: Any) -> float:
    """Both regressed on z, and the residuals correlated."""
    left = [values - np.polyval(np.polyfit(z, values, 1), z) for values in (x, y)]
    return float(stats.pearsonr(*left).statistic)


def test_partial_correlations_given_the_best_text_control() -> None:
    rng = np.random.default_rng(1)
    change = rng.normal(0, 0.05, 20)
    digits = -np.abs(change) + rng.normal(0, 0.02, 20)  # the other way, and still the best
    score = np.abs(change) + rng.normal(0, 0.02, 20)
    run = with_texts(score, {"text_digits": digits, "text_length": rng.normal(size=20), "raw": -digits})
    result = validate(run, outcomes_from(change))
    given, signed = result.size_given_text, result.signed_given_text
    assert given is not None
    assert given.pearson is not None
    assert given.spearman is not None
    assert signed is not None
    assert given.control == "text_digits share"
    assert given.r == pytest.approx(stats.pearsonr(digits, np.abs(change)).statistic)
    assert given.pearson.value == pytest.approx(residual_r(score, np.abs(change), digits), rel=1e-9)
    ranks = map(stats.rankdata, (score, np.abs(change), digits))
    assert given.spearman.value == pytest.approx(residual_r(*ranks), rel=1e-9)
    # Of the signed change another control may be the best.
    texts = {
        "text_digits share": digits,
        "text_length share": [d["controls"]["text_length"]["share"] for d in run["domains"]],
    }
    best = max(texts, key=lambda name: abs(stats.pearsonr(texts[name], change).statistic))
    assert signed.control == best
    assert signed.pearson is not None
    assert signed.pearson.value == pytest.approx(residual_r(score, change, np.asarray(texts[best])), rel=1e-9)

    drawn = np.random.default_rng(9).integers(0, 20, (3000, 20))
    again = [residual_r(score[at], np.abs(change)[at], digits[at]) for at in drawn]
    assert given.pearson.ci_domains == pytest.approx(np.percentile(again, [2.5, 97.5]), abs=0.05)
    assert given.pearson.ci is not None
    low, high = given.pearson.ci
    assert low < given.pearson.value < high + 0.1
    text = " ".join(result.to_text().split())
    assert f"Pearson r given text {given.pearson.value:.2f}" in text
    assert "given share of digits, the control with the largest |r|" in text
    assert json.loads(json.dumps(result.to_dict()))["size_given_text"]["control"] == "text_digits share"


@pytest.mark.parametrize(
    ("of_text", "own", "says"),
    [
        (0.001, 0.5, "The text of the questions alone explains as much: share of digits, the best of the controls"),
        (0.03, 0.2, "The text of the questions may explain it: share of digits, the best of the controls"),
        (0.1, 1.0, "Text alone explains less: share of digits, the best of the controls that need no model"),
    ],
    ids=["text is better", "score is little better", "score is far better"],
)
def test_verdict_stands_beside_what_the_text_explains(of_text: float, own: float, says: str) -> None:
    """own: what the score knows of the change itself; the rest of it is what the text says, and noise."""
    rng = np.random.default_rng(3)
    change = rng.normal(0, 0.05, 24)
    digits = np.abs(change) + rng.normal(0, of_text, 24)
    score = own * np.abs(change) + (1 - own) * digits + rng.normal(0, 0.01, 24)
    result = validate(with_texts(score, {"text_digits": digits}), outcomes_from(change))
    assert says in result.verdict
    assert "explain" not in result.verdict.replace(says, "")
    r = stats.pearsonr(digits, np.abs(change)).statistic
    partial = residual_r(score, np.abs(change), digits)
    assert f", has r = {r:.2f}; given it, the score's partial r is {partial:.2f} [" in result.verdict
    assert " ".join(result.to_text().split()).startswith(result.verdict)
    assert result.to_dict()["verdict"] == result.verdict


def test_the_best_of_several_text_controls_is_the_one_beside_the_verdict() -> None:
    rng = np.random.default_rng(5)
    change = rng.normal(0, 0.05, 16)
    size = np.abs(change)
    texts = {
        "text_similarity": size + rng.normal(0, 0.05, 16),
        "text_length": -size + rng.normal(0, 0.01, 16),
        "text_digits": rng.normal(0, 1, 16),
    }
    verdict = validate(with_texts(size + rng.normal(0, 0.004, 16), texts), outcomes_from(change)).verdict
    best = max(texts, key=lambda name: abs(stats.pearsonr(texts[name], size).statistic))
    label = {"text_similarity": "shared n-grams", "text_length": "question length", "text_digits": "share of digits"}[
        best
    ]
    assert f"{label}, the best of the controls that need no model" in verdict


def test_a_run_with_controls_but_none_of_text_is_told_so() -> None:
    rng = np.random.default_rng(0)
    change, score, raw = rng.normal(0, 0.05, (3, 9))
    said = "The run has no control made from the text of the questions alone"
    assert said in validate(with_texts(score, {"raw": raw}), outcomes_from(change)).verdict
    assert said not in validate(with_texts(score, {"text_digits": raw}), outcomes_from(change)).verdict
    assert said not in validate(with_texts(score, {}), outcomes_from(change)).verdict


def test_runs_without_text_controls_have_no_partial_correlation() -> None:
    rng = np.random.default_rng(0)
    change, score = rng.normal(0, 0.05, (2, 9))
    nowhere: list[dict[str, Any]] = [
        {},
        {"raw": change},
        {"text_digits": [0.0] * 9},
        {"text_digits": [None, *change[1:]]},
    ]
    for texts in nowhere:
        result = validate(with_texts(score, texts), outcomes_from(change))
        assert result.size_given_text is None
        assert result.signed_given_text is None
        assert "given text" not in result.to_text()
    # What the text determines has nothing left to correlate.
    given = validate(with_texts(score, {"text_digits": 2 * score + 1}), outcomes_from(change)).size_given_text
    assert given is not None
    assert given.pearson is None
    assert given.spearman is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, o: s.update(d0=math.nan), "the score of 'd0' is nan, not a number"),
        (lambda s, o: s.update(d0=None), "the score of 'd0' is None, not a number"),
        (lambda s, o: s.update(d0=(1.0, 2.0, math.inf)), "the interval of 'd0' is inf, not a number"),
        (lambda s, o: s.update(d0=(1.0, 2.0, 0.0)), "the interval of 'd0' ends before it begins"),
        (lambda s, o: o.update(d0=Outcome(math.nan)), "the change of 'd0' is nan, not a number"),
        (lambda s, o: o.update(d0=Outcome(1e308)), "the change of 'd0' is 1e+308, not a number"),
        (lambda s, o: o.update(d0=Outcome(0.1, stderr=math.nan)), "the standard error of 'd0' is nan"),
        (lambda s, o: o.update(d0=Outcome(0.1, stderr=-1.0)), "the standard error of 'd0' is negative"),
        (lambda s, o: s.update(dict.fromkeys(s, 1.0)), "all 5 domains in both have the same score"),
        (lambda s, o: o.update(dict.fromkeys(o, Outcome(0.1))), "the change of all 5 domains is of the same size"),
        (lambda s, o: [o.pop(name) for name in ("d0", "d1")], "only 3 domains are in both, and 4 are needed"),
        (lambda s, o: o.clear(), "the outcomes have none"),
    ],
)
def test_faults_of_numbers(change: Any, message: str) -> None:
    scores, outcomes = made_up(5)
    change(scores, outcomes)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        validate(scores, outcomes)
    assert "\n" not in str(caught.value)


def test_faults_of_a_run(tmp_path: Path) -> None:
    _, outcomes = made_up(5)
    run = run_folder(tmp_path / "run", run_domains())
    flat = [{**domain, "scores": {"act": {"value": 1.0, "ci": 3}}} for domain in run_domains()]
    with pytest.raises(InputError, match=r"the interval of '.*' in .* is not a pair of numbers"):
        validate({"domains": flat}, outcomes)
    with pytest.raises(InputError, match=r"has no scores by 'act_sq', only by act, icl"):
        validate(run, outcomes, estimator="act_sq")
    with pytest.raises(InputError, match=r"has no scores\.json itself, but folders that do \(run\): give one of them"):
        validate(tmp_path, outcomes)
    for text, message in (("{", "not readable JSON"), ("[]", "not a JSON object"), ("{}", "without a schema version")):
        (tmp_path / "scores.json").write_text(text)
        with pytest.raises(InputError, match=message):
            validate(tmp_path, outcomes)
    with pytest.raises(InputError, match="a domain has no name"):
        validate({"domains": [3]}, outcomes)
    with pytest.raises(ValueError, match="give outcomes, or before and after"):
        validate(run)
    with pytest.raises(InputError, match="4 domains are needed, not 2"):
        outcome_limits({"a": Outcome(1.0), "b": Outcome(2.0)})
    with pytest.raises(InputError, match="is of the same size"):
        outcome_limits({name: Outcome((-1.0) ** i) for i, name in enumerate("abcd")})


# ---- the published numbers


# Median over eight real pairs of models of the paired standard error of the change on MMLU-Pro, to six digits.
MEDIAN_STDERR = {
    "engineering": 0.015820, "chemistry": 0.014990, "physics": 0.014212, "computer science": 0.025893,
    "other": 0.015425, "psychology": 0.016724, "history": 0.024397, "law": 0.014679,
}  # fmt: skip


def published() -> dict[str, Outcome]:
    return {name: Outcome(change, stderr=MEDIAN_STDERR[name]) for name, change in PUBLISHED.items()}


def real_pairs() -> list[dict[str, Any]]:
    pairs: list[dict[str, Any]] = json.loads((ASSETS / "data" / "mmlu_pro" / "actual_change_pairs.json").read_text())
    return pairs


def outcomes_of(pair: dict[str, Any]) -> dict[str, Outcome]:
    return {
        name: Outcome(d["delta"], d["acc_before"], d["acc_after"], d["paired_stderr"], d["n"], None, True)
        for name, d in pair["domains"].items()
        if name != "ALL"
    }


@needs_assets
def test_median_standard_errors_are_those_of_the_real_pairs() -> None:
    for name, value in MEDIAN_STDERR.items():
        median = np.median([pair["domains"][name]["paired_stderr"] for pair in real_pairs()])
        assert value == pytest.approx(median, abs=1e-6)


def test_five_of_the_eight_published_changes_cannot_be_told_from_zero() -> None:
    # By hand: .0980 / .015820 = 6.19, .0636 / .014990 = 4.24, .0524 / .014212 = 3.69, .0488 / .025893 = 1.88, ...
    result = validate(PUBLISHED, published())
    assert [round(row.z, 1) for row in result.domains if row.z] == [6.2, 4.2, 3.7, 1.9, 0.8, 0.2, 0.1, 0.1]
    assert result.limits.n_distinguishable == 3
    assert "3 of 8 changes differ from zero at 5%" in result.to_text()


def test_ceiling_of_the_eight_published_changes() -> None:
    limits = outcome_limits(published())
    d, se = np.asarray(list(PUBLISHED.values())), np.asarray(list(MEDIAN_STDERR.values()))
    rng = np.random.default_rng(99)
    reached = [stats.pearsonr(d, np.abs(rng.normal(d, se))).statistic for _ in range(2000)]
    low, median, high = np.percentile(reached, [2.5, 50, 97.5])
    assert median == pytest.approx(0.91, abs=0.01)
    assert limits.ceiling == pytest.approx(median, abs=0.01)
    assert limits.ceiling_ci == pytest.approx((low, high), abs=0.03)


def test_chance_that_a_random_forecast_exceeds_seven_tenths() -> None:
    limits = outcome_limits(published())
    # P(r > .7) of 8 points is P(t_6 > 2.401) = 2.66%, as an incomplete beta function.
    assert limits.chance_above_good == pytest.approx(special.betainc(3, 0.5, 1 - 0.49) / 2, abs=1e-6)
    assert limits.chance_above_good == pytest.approx(0.026, abs=0.001)
    # A ranking, 1 to 8 in any order, against these very changes: counted one by one.
    d = np.asarray(list(PUBLISHED.values()))
    z = stats.zscore(d)
    ranks = np.asarray(list(itertools.permutations(stats.zscore(np.arange(8.0)))))
    assert limits.chance_ranking_above_good == np.mean(ranks @ z / 8 > 0.7)
    assert limits.chance_ranking_above_good == pytest.approx(0.0285, abs=1e-4)


def test_the_eight_published_changes_cannot_tell_a_good_forecast_from_a_useless_one() -> None:
    rng = np.random.default_rng(0)
    result: Validation = validate({name: float(rng.random()) for name in PUBLISHED}, published())
    assert result.limits.power < 0.8
    assert result.verdict.startswith(
        "These outcomes cannot tell a good forecast from a useless one (5 of 8 changes cannot be told from zero, "
        "8 domains are few)"
    )


@needs_assets
def test_reliability_is_near_that_of_split_halves() -> None:
    """Split-half reliability, corrected by Spearman and Brown, was computed by another program from every answer."""
    path = ASSETS / "data" / "mmlu_pro" / "reliability_of_abs_change.json"
    split = {(entry["base"], entry["tuned"]): entry["spearman_brown_14"] for entry in json.loads(path.read_text())}
    found: dict[tuple[str, str], Limits] = {}
    for pair in real_pairs():
        found[pair["base"], pair["tuned"]] = outcome_limits(Outcomes(outcomes_of(pair)))
    assert split.keys() == found.keys()
    for names, limits in found.items():
        # The largest difference of the eight is .12; the order is the same.
        assert limits.reliability == pytest.approx(split[names], abs=0.13), names
    order = stats.spearmanr([split[k] for k in found], [found[k].reliability for k in found]).statistic
    assert order > 0.95
