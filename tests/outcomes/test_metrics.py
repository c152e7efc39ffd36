"""Which metric is read, on which scale, which way is better, and answers whose format changed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from evaluation_results import CASES, accuracies, write_results

from sts_fast.errors import InputError
from sts_fast.outcomes.metrics import is_accuracy
from sts_fast.outcomes.outcomes import Outcome, cautions, read_outcomes
from sts_fast.outcomes.validate import validate

needs_cases = pytest.mark.skipif(not CASES.is_dir(), reason="the situations from reports are not on this machine")

SCORES = {"law": 1.0, "math": 4.0, "physics": 3.0, "history": 2.0}
BEFORE = accuracies(law=0.31, math=0.42, physics=0.28, history=0.55)
AFTER = accuracies(law=0.33, math=0.70, physics=0.45, history=0.50)
# Of before - after of the tables of 09_csv_percent_fraction, as shares of 1.
CHANGES = {"law": -0.02, "math": -0.28, "physics": -0.17, "history": 0.05}


def pair(folder: Path, before: dict[str, Any], after: dict[str, Any], **more: Any) -> tuple[Path, Path]:
    return (
        write_results(folder / "a", {**BEFORE, **before}, **more),
        write_results(folder / "b", {**AFTER, **after}, model="out/tuned", **more),
    )


# ---- scale


@needs_cases
@pytest.mark.parametrize("name", ["b.csv", "b2.csv"])
def test_percent_beside_fractions_is_read_as_fractions(name: str) -> None:
    folder = CASES / "09_csv_percent_fraction"
    outcomes = read_outcomes(folder / "a.csv", folder / name)
    assert {domain: outcome.change for domain, outcome in outcomes.domains.items()} == pytest.approx(CHANGES)
    said = "percentages after training were divided by 100: law, math, physics, history"
    assert (said in outcomes.warnings) == (name == "b.csv")


def test_tables_in_percent_are_shares_too(tmp_path: Path) -> None:
    for name, law in (("a", 31.0), ("b", 33.5)):
        (tmp_path / f"{name}.csv").write_text(f"domain,accuracy,stderr\nlaw,{law},2.5\nmath,3,0.9\n")
    outcomes = read_outcomes(tmp_path / "a.csv", tmp_path / "b.csv")
    law = outcomes.domains["law"]
    assert law.change == pytest.approx(0.025)
    assert law.stderr == pytest.approx(math.hypot(0.025, 0.025))
    assert [warning[:19] for warning in outcomes.warnings] == ["percentages before ", "percentages after t"]
    (tmp_path / "d.csv").write_text("Domain;Accuracy\nlaw;31%\n")
    assert read_outcomes(tmp_path / "d.csv", tmp_path / "a.csv").domains["law"].change == pytest.approx(0.0)
    # A change in points cannot be told from one in shares, so a sign tells it.
    (tmp_path / "c.csv").write_text("domain,change,stderr\nlaw,-3.5%,1%\n")
    assert read_outcomes(tmp_path / "c.csv").domains["law"] == Outcome(pytest.approx(-0.035), stderr=0.01)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "domain,accuracy\nlaw,.31\nmath,42\n",
            "shares of 1 (law: 0.31) beside percentages (math: 42): write all alike",
        ),
        ("domain,acc\nlaw,31\nmath,42\nphysics,0.28\n", "shares of 1 (physics: 0.28) beside percentages (law: 31)"),
        ("domain,before,after\nlaw,.31,33\n", "shares of 1 (law before: 0.31) beside percentages (law after: 33)"),
        ("domain,before,after\nlaw,.31,.3\nmath,42,70\n", "shares of 1 (law before: 0.31) beside percentages (math"),
    ],
)
def test_one_table_with_both_scales_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.csv"
    path.write_text(text)
    after = None if "before" in text else path
    with pytest.raises(InputError) as caught:
        read_outcomes(path, after)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_f1_of_0_to_100_beside_accuracies(tmp_path: Path) -> None:
    """As of squadv2; a paired change by question is on the same scale."""
    first, second = pair(
        tmp_path, {"history": {"alias": "history", "f1,none": 76.0, "f1_stderr,none": 1.5, "exact,none": 70.0}},
        {"history": {"alias": "history", "f1,none": 61.0, "f1_stderr,none": 2.0, "exact,none": 55.0}},
    )  # fmt: skip
    outcomes = read_outcomes(first, second)
    history = outcomes.domains["history"]
    assert (history.before, history.change) == (pytest.approx(0.76), pytest.approx(-0.15))
    assert history.stderr == pytest.approx(0.025)
    assert "percentages before training were divided by 100: history" in outcomes.warnings


@pytest.mark.parametrize(
    ("before", "after"), [(0.76, 61.0), (61.0, 0.76), (0.9, 310.0), (-0.1, 0.2)],
    ids=["scale of one side", "scale of the other", "no share at all", "negative"],
)  # fmt: skip
def test_what_is_on_no_certain_scale_is_left_out_by_name(tmp_path: Path, before: float, after: float) -> None:
    folders = pair(tmp_path, {"f": {"alias": "f", "f1,none": before}}, {"f": {"alias": "f", "f1,none": after}})
    outcomes = read_outcomes(*folders)
    assert "f" not in outcomes.domains
    assert (
        "left out, because it is not certain which are percentages and which shares of 1: "
        f"f (f1,none {before:g} before, {after:g} after)"
    ) in outcomes.warnings
    with pytest.raises(InputError, match="not certain which are percentages"):
        read_outcomes(*folders, metric="f1")


def test_zero_is_on_either_scale(tmp_path: Path) -> None:
    folders = pair(tmp_path, {"f": {"alias": "f", "f1,none": 0.0}}, {"f": {"alias": "f", "f1,none": 31.0}})
    assert read_outcomes(*folders).domains["f"].change == pytest.approx(0.31)


def test_a_standard_error_on_another_scale_is_named(tmp_path: Path) -> None:
    tables = {"a": "law,.31,3\nmath,.4,.02\nart,.5,.0001\n", "b": "law,.33,.03\nmath,.5,.02\nart,.6,.02\n"}
    for name, rows in tables.items():
        (tmp_path / f"{name}.csv").write_text("domain,accuracy,stderr\n" + rows)
    outcomes = read_outcomes(tmp_path / "a.csv", tmp_path / "b.csv")
    # An error of 3 is one of 3 percent; one of .0001 would need 25 million questions.
    assert outcomes.domains["law"].stderr == pytest.approx(math.hypot(0.03, 0.03))
    assert outcomes.domains["art"].stderr is None
    (said,) = [warning for warning in outcomes.warnings if "standard errors" in warning]
    assert said.endswith("law (0.31 ± 3), art (0.5 ± 0.0001)")


# ---- metric


@needs_cases
def test_metrics_of_ifeval_and_mbpp() -> None:
    folder = CASES / "07_lmeval_unknown_metric"
    outcomes = read_outcomes(folder / "b", folder / "a")
    assert outcomes.domains["math"].metric == "prompt_level_strict_acc,none"
    assert outcomes.domains["mbpp"].metric == "pass_at_1,none"
    named = read_outcomes(folder / "b", folder / "a", metric=["acc", "math=inst_level_strict_acc", "code=pass_at_1"])
    assert named.domains["math"].metric == "inst_level_strict_acc,none"
    assert named.domains["math"].stderr is None
    # The task's own name is 'code', and it is shown as 'mbpp': a domain may have either.
    scores = {"law": 1.0, "code": 4.0, "physics": 3.0, "history": 2.0}
    assert "code" in [row.name for row in validate(scores, before=folder / "b", after=folder / "a").domains]


@pytest.mark.parametrize(
    "metric",
    [
        "acc,none", "exact_match,strict-match", "pass@1,create_test", "pass@k:k=1&n=1", "pass@1:1_samples", "em",
        "humaneval_pass@1", "extractive_match", "quasi_exact_match", "accuracy,choice", "math_verify,none",
    ],
)  # fmt: skip
def test_accuracies_of_every_harness(metric: str) -> None:
    assert is_accuracy(metric)


@pytest.mark.parametrize("metric", ["bleu,none", "pass@10", "mcc", "word_perplexity,none", "score", "mean,judge"])
def test_what_is_no_accuracy(metric: str) -> None:
    assert not is_accuracy(metric)


def test_tasks_without_a_known_accuracy_are_listed_with_what_they_have(tmp_path: Path) -> None:
    folders = pair(
        tmp_path, {"wmt": {"alias": "wmt", "bleu,none": 20.0, "chrf,none": 30.0}},
        {"wmt": {"alias": "wmt", "bleu,none": 25.0, "chrf,none": 31.0}},
    )  # fmt: skip
    outcomes = read_outcomes(*folders)
    assert (
        "left out, without a known accuracy (accuracy, acc, exact_match, pass@1, pass_at_1, acc_norm, ...): wmt "
        "(bleu,none, chrf,none); name one with --metric TASK=METRIC"
    ) in outcomes.warnings
    only = read_outcomes(*folders, metric="bleu")
    assert (
        "left out, without the metric bleu: law (acc,none), math (acc,none), physics (acc,none), history (acc,none); "
        "name one with --metric TASK=METRIC"
    ) in only.warnings
    named = read_outcomes(*folders, metric="wmt=bleu")
    assert (named.domains["wmt"].change, named.domains["law"].metric) == (5.0, "acc,none")
    assert any("changes of wmt (bleu) are no shares of right answers" in caution for caution in cautions(named.domains))


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (["acc", "f1"], "--metric acc and --metric f1 are both for all tasks"),
        (["law=f1"], "--metric law=f1: 'law' has no f1, only acc,none"),
        (["art=acc"], "there is no task 'art' in both evaluations, only law, math, physics, history"),
        (["law=acc", "LAW=acc"], "--metric is given twice for 'LAW'"),
    ],
)
def test_faults_of_metrics(tmp_path: Path, metric: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_outcomes(*pair(tmp_path, {}, {}), metric=metric)
    assert message in str(caught.value)


# ---- direction


@pytest.mark.parametrize(
    ("metric", "better", "gain"),
    [
        ("word_perplexity", None, True),
        ("bits_per_byte", False, True),
        ("brier_score", None, True),
        ("rate", False, True),
        ("rate", None, False),
        ("glossary_rate", None, False),
        ("toxicity", True, False),  # what the harness says counts
    ],
)
def test_a_gain_is_positive_where_lower_is_better(tmp_path: Path, metric: str, better: bool | None, gain: bool) -> None:
    said = {} if better is None else {"higher_is_better": {"wiki": {metric: better}}}
    key = f"{metric},none"
    folders = pair(tmp_path, {"wiki": {"alias": "wiki", key: 12.0}}, {"wiki": {"alias": "wiki", key: 9.0}}, **said)
    outcomes = read_outcomes(*folders, metric=f"wiki={metric}")
    wiki = outcomes.domains["wiki"]
    assert (wiki.before, wiki.after, wiki.change) == (12.0, 9.0, 3.0 if gain else -3.0)
    assert any(f"lower is better for {metric}: " in warning for warning in outcomes.warnings) == gain


# ---- format


@needs_cases
def test_strict_match_that_parts_from_flexible_extract() -> None:
    folder = CASES / "04_gsm8k_strict"
    outcomes = read_outcomes(folder / "b", folder / "a")
    (said,) = [warning for warning in outcomes.warnings if "strict-match" in warning]
    assert "exact_match,strict-match went from 0.75 to 0.2, but exact_match,flexible-extract" in said
    assert "from 0.76 to 0.785: what changed is the format of the answers, not the ability" in said
    # By hand: .785 - .76, and not .20 - .75.
    assert outcomes.domains["math"].change == pytest.approx(0.025)
    strict = read_outcomes(folder / "b", folder / "a", metric=["math=exact_match,strict-match"])
    assert strict.domains["math"].change == pytest.approx(-0.55)
    assert any("what changed is the format" in warning for warning in strict.warnings)


@pytest.mark.parametrize(
    ("strict", "free", "before", "after", "taken"),
    [
        ("prompt_level_strict_acc,none", "prompt_level_loose_acc,none", (0.5, 0.6), (0.2, 0.59), "loose"),
        ("exact_match,none", "math_verify,none", (0.4, 0.45), (0.1, 0.7), "math_verify"),
        ("exact_match,strict-match", "exact_match,flexible-extract", (0.4, 0.42), (0.5, 0.53), "strict-match"),
    ],
    ids=["ifeval", "minerva_math, which rose too", "both rose alike"],
)
def test_other_readings_of_the_same_answers(
    tmp_path: Path, strict: str, free: str, before: tuple[float, float], after: tuple[float, float], taken: str
) -> None:
    folders = pair(
        tmp_path, {"x": {"alias": "x", strict: before[0], free: before[1]}},
        {"x": {"alias": "x", strict: after[0], free: after[1]}},
    )  # fmt: skip
    outcomes = read_outcomes(*folders)
    assert taken in outcomes.domains["x"].metric
    said = [warning for warning in outcomes.warnings if "same answers in more formats" in warning]
    assert len(said) == (taken != "strict-match")
    if taken == "math_verify":
        assert "the format of the answers changed too, not the ability alone" in said[0]


def test_readings_that_part_alike_in_many_tasks_are_said_once(tmp_path: Path) -> None:
    strict, free = "exact_match,strict-match", "exact_match,flexible-extract"
    # In 20 tasks only the format changed, in 10 more the ability too.
    changes = {f"task_{i}": 0.01 if i < 20 else 0.2 for i in range(30)}
    folders = pair(
        tmp_path, {name: {strict: 0.7, free: 0.71} for name in changes},
        {name: {strict: 0.2, free: 0.71 + change} for name, change in changes.items()},
    )  # fmt: skip
    outcomes = read_outcomes(*folders)
    alone, beside = (warning for warning in outcomes.warnings if "same answers in more formats" in warning)
    assert alone.startswith("task_0: ")
    assert "not the ability; the latter is compared" in alone
    assert alone.endswith("; so in task_1, task_2, task_3, task_4, task_5, task_6, task_7, task_8 and 11 more")
    assert beside.startswith("task_20: ")
    assert beside.endswith("task_28 and 1 more")
    assert all(outcomes.domains[name].change == pytest.approx(change) for name, change in changes.items())


# ---- groups, and numbers that are none


def test_a_group_and_its_members_are_not_counted_twice(tmp_path: Path) -> None:
    group = {"group_subtasks": {"mmlu": ["stem", "humanities"], "stem": ["math", "physics"], "humanities": ["law"]}}
    more = accuracies(mmlu=0.5, stem=0.4, humanities=0.3, art=0.2)
    folders = pair(tmp_path, more, accuracies(mmlu=0.4, stem=0.45, humanities=0.31, art=0.3), **group)
    outcomes = read_outcomes(*folders)
    assert outcomes.members["mmlu"] == ("humanities", "law", "math", "physics", "stem")
    scores = {**SCORES, "stem": 5.0, "mmlu": 6.0}
    result = validate(scores, before=folders[0], after=folders[1])
    assert [row.name for row in result.domains] == list(SCORES)
    assert "left out, because it is a mean over math, physics, which would count twice: stem" in result.warnings
    with pytest.raises(InputError, match=r"only 3 domains are in both.*a mean over law, .*: humanities"):
        validate({"law": 1.0, "stem": 2.0, "history": 3.0, "humanities": 0.5}, before=folders[0], after=folders[1])
    # A group without its members is an outcome like any other.
    alone = {"history": 1.0, "stem": 2.0, "humanities": 3.0, "art": 0.5}
    assert [row.name for row in validate(alone, before=folders[0], after=folders[1]).domains] == list(alone)


def test_nan_is_named_and_not_read(tmp_path: Path) -> None:
    folders = pair(tmp_path, {}, {"law": {"alias": "law", "acc,none": math.nan, "acc_norm,none": 0.4}})
    outcomes = read_outcomes(*folders)
    assert set(outcomes.domains) == {"math", "physics", "history"}
    assert any("not a number, and left out: acc of law" in warning for warning in outcomes.warnings)
    assert json.loads((folders[1] / "results_2025-05-01T10-00-00.000000.json").read_text())["results"]["law"]


def test_kinds_of_accuracy_are_one_unit_and_others_are_named(tmp_path: Path) -> None:
    entries: dict[str, dict[str, Any]] = {
        "law": {"acc,none": 0.3}, "gsm8k": {"exact_match,strict-match": 0.4}, "humaneval": {"pass@1,create_test": 0.2},
        "wikitext": {"word_perplexity,none": 10.0},
    }  # fmt: skip
    folders = pair(tmp_path, entries, entries)
    known = read_outcomes(*folders)
    assert not [text for text in cautions(known.domains) if "compared" in text]
    mixed = read_outcomes(*folders, metric="wikitext=word_perplexity")
    (said,) = [text for text in cautions(mixed.domains) if "compared" in text]
    assert said.startswith("changes of wikitext (word_perplexity) are no shares of right answers")
    # The remedy: a metric of the same kind for that task.
    entries["wikitext"] |= {"acc,none": 0.1}
    folders = pair(tmp_path, entries, entries)
    assert not [text for text in cautions(read_outcomes(*folders).domains) if "compared" in text]
