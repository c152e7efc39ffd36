from __future__ import annotations

import csv
import gzip
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from sts_fast.errors import InputError
from sts_fast.outcomes.names import match_domains
from sts_fast.outcomes.outcomes import Outcome, cautions, read_outcomes

ASSETS = Path(__file__).parents[3] / "shared" / "assets"
needs_assets = pytest.mark.skipif(not ASSETS.is_dir(), reason="the real evaluation results are not on this machine")

TIME = "2025-01-02T03-04-05.678901"


def lm_eval_folder(
    folder: Path,
    answers: dict[str, list[float]],
    *,
    samples: bool = True,
    time: str = TIME,
    alias: str = "{}",
    entry: dict[str, Any] | None = None,
    hashes: str = "q",
) -> Path:
    """Results and samples as the harness writes them, of tasks mmlu_pro_<name> with these 0/1 answers."""
    folder.mkdir(parents=True, exist_ok=True)
    results, counts = {}, {}
    for name, right in answers.items():
        task = f"mmlu_pro_{name}"
        n = len(right)
        results[task] = {
            "alias": alias.format(name),
            "exact_match,custom-extract": sum(right) / n,
            "exact_match_stderr,custom-extract": float(stats.sem(right)),
            **(entry or {}),
        }
        counts[task] = {"original": n, "effective": n}
        if samples:
            rows = [
                {
                    "doc_id": i,
                    "doc": {"question": "?"},
                    "filtered_resps": ["[invalid]" if i == 0 else "A"],
                    "filter": "custom-extract",
                    "doc_hash": f"{hashes}{i}",
                    "exact_match": value,
                }
                for i, value in enumerate(right)
            ]
            path = folder / f"samples_{task}_{time}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    document = {"results": results, "n-samples": counts, "group_subtasks": {}}
    (folder / f"results_{time}.json").write_text(json.dumps(document), encoding="utf-8")
    return folder


def answers(seed: int, n: int = 60) -> dict[str, list[float]]:
    rng = np.random.default_rng(seed)
    return {name: rng.integers(0, 2, n).astype(float).tolist() for name in ("law", "math", "physics", "health")}


def test_samples_are_paired_by_question(tmp_path: Path) -> None:
    before, after = answers(0), answers(1)
    outcomes = read_outcomes(lm_eval_folder(tmp_path / "a", before), lm_eval_folder(tmp_path / "b", after))
    assert outcomes.warnings == []
    for name, outcome in outcomes.domains.items():
        difference = np.subtract(after[name], before[name])
        assert outcome.change == pytest.approx(difference.mean())
        assert outcome.stderr == pytest.approx(stats.sem(difference))
        assert (outcome.n, outcome.paired, outcome.metric) == (60, True, "exact_match,custom-extract")
        assert outcome.unparsed == (1 / 60, 1 / 60)


def test_without_samples_the_variances_add(tmp_path: Path) -> None:
    before, after = answers(0), answers(1)
    first = lm_eval_folder(tmp_path / "a", before, samples=False, alias=" - {}")
    second = lm_eval_folder(tmp_path / "b", after)
    outcomes = read_outcomes(first, second / f"results_{TIME}.json")
    for name, outcome in outcomes.domains.items():
        assert outcome.paired is False
        assert outcome.stderr == pytest.approx(math.sqrt(stats.sem(before[name]) ** 2 + stats.sem(after[name]) ** 2))
    assert any("unpaired" in caution for caution in cautions(outcomes.domains))


def test_cut_samples_are_not_used_and_named(tmp_path: Path) -> None:
    first, second = lm_eval_folder(tmp_path / "a", answers(0)), lm_eval_folder(tmp_path / "b", answers(1))
    cut = second / f"samples_mmlu_pro_law_{TIME}.jsonl"
    cut.write_text("".join(cut.read_text().splitlines(keepends=True)[:5]))
    outcomes = read_outcomes(first, second)
    assert [name for name, outcome in outcomes.domains.items() if not outcome.paired] == ["law"]
    assert "mmlu_pro_law (5 of 60)" in outcomes.warnings[0]


def test_several_extractions_in_one_samples_file_are_told_apart(tmp_path: Path) -> None:
    folders = []
    for seed, name in enumerate("ab"):
        right = answers(seed)
        folder = lm_eval_folder(tmp_path / name, right, entry={"exact_match,strict-match": 0.0})
        for task, values in right.items():
            path = folder / f"samples_mmlu_pro_{task}_{TIME}.jsonl"
            strict = [{"doc_id": i, "filter": "strict-match", "exact_match": 0.0} for i in range(len(values))]
            path.write_text(path.read_text() + "".join(json.dumps(row) + "\n" for row in strict))
        folders.append(folder)
    assert read_outcomes(*folders).domains["law"].paired
    strict_outcome = read_outcomes(*folders, metric="exact_match,strict-match").domains["law"]
    assert (strict_outcome.change, strict_outcome.metric) == (0.0, "exact_match,strict-match")


def test_the_newest_results_of_a_folder_are_read(tmp_path: Path) -> None:
    first = lm_eval_folder(tmp_path / "a" / "org__model", answers(0))
    lm_eval_folder(first, answers(2), time="2024-12-31T23-59-59.000001")
    second = lm_eval_folder(tmp_path / "b", answers(1))
    outcomes = read_outcomes(tmp_path / "a", second)
    assert outcomes.domains["law"].before == pytest.approx(np.mean(answers(0)["law"]))
    assert "newest of 2 results" in outcomes.warnings[0]


def old_results(path: Path, values: dict[str, dict[str, Any]]) -> Path:
    path.write_text(json.dumps({"results": values, "versions": {}, "config": {}}))
    return path


def test_old_layout_and_choice_of_metric(tmp_path: Path) -> None:
    entry = {"acc": 0.5, "acc_stderr": 0.03, "acc_norm": 0.6, "acc_norm_stderr": 0.04, "ppl": 9.0}
    first = old_results(tmp_path / "a.json", {"hendrycksTest-law": entry, "wiki": {"word_perplexity": 12.0}})
    second = old_results(
        tmp_path / "b.json",
        {"hendrycksTest-law": {**entry, "acc": 0.7, "acc_stderr": "N/A", "acc_norm": 0.5}, "wiki": {"acc": "N/A"}},
    )
    by_default = read_outcomes(first, second).domains
    assert list(by_default) == ["hendrycksTest-law"]
    law = by_default["hendrycksTest-law"]
    assert (law.change, law.stderr, law.metric) == (pytest.approx(0.2), None, "acc,none")
    norm = read_outcomes(first, second, metric="acc_norm").domains["hendrycksTest-law"]
    assert (norm.change, norm.stderr) == (pytest.approx(-0.1), pytest.approx(math.hypot(0.04, 0.04)))
    assert read_outcomes(first, second, metric="ppl").domains["hendrycksTest-law"].change == 0.0
    with pytest.raises(InputError, match="no domain with the metric bleu: name one of acc,none"):
        read_outcomes(first, second, metric="bleu")


def official(path: Path, rows: list[tuple[str, int, str, str]], key: str = "model_outputs") -> Path:
    """MMLU-Pro's per-question JSON: (category, question id, answer, generation)."""
    document = [
        {
            "question_id": question, "question": f"question {question}", "options": ["x", "y"], "answer": answer,
            "answer_index": 0, "cot_content": "", "category": category, "src": "", "pred": "A", key: text,
        }
        for category, question, answer, text in rows
    ]  # fmt: skip
    path.write_text(json.dumps(document))
    return path


def test_mmlu_pro_answers_are_read_again(tmp_path: Path) -> None:
    # The stored pred says A everywhere: it is a guess where nothing could be read.
    before = [
        ("law", 1, "A", "so the answer is (A)."),
        ("law", 2, "A", "I do not know"),
        ("law", 3, "B", "the answer is B. No, the answer is (C)."),
        ("law", 4, "B", "The answer is (C)"),
    ]
    after = [(*row[:3], f"the answer is ({row[2]})") for row in before]
    first = official(tmp_path / "a.json", before)
    (tmp_path / "b").mkdir()
    official(tmp_path / "b" / "law.json", after, key="generated_text")
    law = read_outcomes(first, tmp_path / "b").domains["law"]
    # Right before: 1, 3 (the first match counts); unread: 2.
    assert (law.before, law.after, law.change, law.unparsed) == (0.5, 1.0, 0.5, (0.25, 0.0))
    assert law.stderr == pytest.approx(stats.sem([0, 1, 0, 1]))
    assert "no choice could be read in 25.0% of answers before and 0.0% after" in next(cautions({"law": law}))


def test_questions_that_differ_are_left_out(tmp_path: Path) -> None:
    rows = [("law", i, "A", "the answer is (A)") for i in range(10)]
    first = official(tmp_path / "a.json", rows)
    second = official(tmp_path / "b.json", [*rows[:7], ("law", 7, "B", "the answer is (A)")])
    outcomes = read_outcomes(first, second)
    assert outcomes.domains["law"].n == 7
    assert outcomes.warnings == ["law: 3 of 10 questions differ between the two and were left out"]
    more = [("art", i, "A", "the answer is (A)") for i in range(4)]
    first = official(tmp_path / "c.json", [*rows, *more])
    second = official(tmp_path / "d.json", [*rows[:7], *more[:3]])
    said = "law: 3 of 10, art: 1 of 4 questions differ between the two and were left out"
    assert read_outcomes(first, second).warnings == [said]


def test_mmlu_pro_summaries(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("biology", "law"):
        counts = {"corr": 30.0, "wrong": 70.0, "acc": 0.3}
        (tmp_path / "a" / f"{name}_summary.json").write_text(json.dumps({name: counts, "total": counts}))
    text = tmp_path / "b_summary.txt"
    text.write_text(
        "\n------category level sta------\nAverage accuracy 0.5656 - biology\nAverage accuracy 0.2 - law\n"
        "\n------average acc sta------\nAverage accuracy: 0.3680\n"
    )
    outcomes = read_outcomes(tmp_path / "a", text)
    assert {name: round(outcome.change, 4) for name, outcome in outcomes.domains.items()} == {
        "biology": 0.2656,
        "law": -0.1,
    }
    assert outcomes.domains["law"].stderr is None
    assert all("random guess" in warning for warning in outcomes.warnings)
    same = read_outcomes(tmp_path / "a", tmp_path / "a").domains["law"]
    assert same.stderr == pytest.approx(math.sqrt(2) * stats.sem([1] * 30 + [0] * 70))


def test_tables(tmp_path: Path) -> None:
    both = tmp_path / "both.csv"
    both.write_text("\ufeffDomain,Before,After,stderr\nlaw,.2,.3,.01\nmath, .5,.4,\n")
    outcomes = read_outcomes(both).domains
    assert outcomes["law"] == Outcome(pytest.approx(0.1), 0.2, 0.3, 0.01)
    assert outcomes["math"].stderr is None
    changes = tmp_path / "changes.tsv"
    changes.write_text("category\tchange\tn\nlaw\t-.1\t50\n")
    assert read_outcomes(changes, changes).domains == {"law": Outcome(-0.1, n=50)}
    for name, value in (("x.csv", 0.5), ("y.csv", 0.6)):
        (tmp_path / name).write_text(f"domain,accuracy,stderr\nlaw,{value},.03\n")
    law = read_outcomes(tmp_path / "x.csv", tmp_path / "y.csv").domains["law"]
    assert (law.change, law.stderr) == (pytest.approx(0.1), pytest.approx(math.sqrt(2) * 0.03))


def test_names_are_matched() -> None:
    known = ["mmlu_pro_computer_science", "hendrycksTest-law", "Math", "mmlu_philosophy", "mmlu_pro_philosophy"]
    assert match_domains(["computer science", "LAW", "math", "mmlu-pro philosophy", "physics"], known) == {
        "computer science": "mmlu_pro_computer_science",
        "LAW": "hendrycksTest-law",
        "math": "Math",
        "mmlu-pro philosophy": "mmlu_pro_philosophy",
    }
    # Two benchmarks have two domains of one name; hendrycksTest is an older name of mmlu.
    assert match_domains(["mmlu_pro_law"], ["mmlu_law"]) == {}
    assert match_domains(["mmlu law"], ["hendrycksTest-law", "mmlu_pro_law"]) == {"mmlu law": "hendrycksTest-law"}
    # A subject is not matched by the end of its name: college physics is not physics.
    assert match_domains(["physics"], ["hendrycksTest-college_physics"]) == {}
    with pytest.raises(InputError, match="'philosophy' could be mmlu_philosophy or mmlu_pro_philosophy"):
        match_domains(["philosophy"], known)
    with pytest.raises(InputError, match="'law' and 'mmlu_law' both match outcome 'Law'"):
        match_domains(["law", "mmlu_law"], ["Law"])


GOOD_TABLE = "domain,accuracy\nlaw,.5\n"
ROW = {"question_id": 1, "answer": "A", "category": "law"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.json", None, "there is no file or folder"),
        ("x.json", "{", "is not readable JSON"),
        ("x.json", "[" * 100_000, "is not readable JSON"),
        ("x.json", "{}", "contains no results of a known format"),
        ("x.json", "[]", "contains no results of a known format"),
        ("x.json", '{"results": {}}', "contains no metric of any task"),
        ("x.json", '{"results": {"law": {"alias": "law", "acc": "N/A"}}}', "contains no metric of any task"),
        ("x.json", '{"law": {"corr": "many", "wrong": 3}}', "law does not give the numbers"),
        ("x.json", '{"law": {"corr": 0, "wrong": 0}}', "law does not give the numbers"),
        ("x.json", json.dumps([ROW]), "neither model_outputs nor generated_text"),
        ("x.json", json.dumps([{**ROW, "model_outputs": ""}] * 2), "twice"),
        ("x.txt", "nothing here", "has no line 'Average accuracy"),
        ("x.txt", "Average accuracy nan - law", "the accuracy of law is 'nan'"),
        ("x.csv", "", "has no column 'domain'"),
        ("x.csv", "a,b\n1,2\n", "has no column 'domain'"),
        ("x.csv", "domain,accuracy\n", "has no rows"),
        ("x.csv", "domain,accuracy\nlaw,high\n", "line 2: accuracy is 'high', not a number"),
        ("x.csv", "domain;accuracy\nlaw;31,5\n", "line 2: accuracy is '31,5', not a number: write 31.5"),
        ("x.csv", "domain,accuracy\nlaw,NaN\n", "line 2: accuracy is 'NaN', not a number"),
        ("x.csv", "domain,accuracy\n,.5\n", "line 2 has no domain"),
        ("x.csv", "domain,accuracy\nlaw,.5\nlaw,.6\n", "line 3: the domain 'law' occurs twice"),
        ("x.csv", "domain,accuracy,stderr\nlaw,.5,-1\n", "the standard error is negative"),
        ("x.csv", "domain,points\nlaw,.5\n", "'law' has no accuracy"),
        ("x.csv", "domain,accuracy\nmath,.5\n", "have no domain in common"),
    ],
)  # fmt: skip
def test_every_fault_is_one_sentence(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    (tmp_path / "good.csv").write_text(GOOD_TABLE)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        read_outcomes(path, tmp_path / "good.csv")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("domain,before\nlaw,.5\n", "neither a change nor values before and after"),
        ("domain,before,after,change\nlaw,.5,.6,.3\n", "is not after - before"),
    ],
)
def test_faults_of_a_table_of_changes(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_outcomes(tmp_path / "x.csv")


def test_faults_of_folders_and_samples(tmp_path: Path) -> None:
    first, second = (
        lm_eval_folder(tmp_path / "a", answers(0)),
        lm_eval_folder(tmp_path / "b", answers(1), hashes="other"),
    )
    with pytest.raises(InputError, match="the questions of 'law' do not pair: only 0 of 60"):
        read_outcomes(first, second)
    with pytest.raises(InputError, match=r"contains results of several models \(a, b\)"):
        read_outcomes(tmp_path, first)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="contains no results"):
        read_outcomes(tmp_path / "empty", first)
    with pytest.raises(InputError, match="alone contains no change"):
        read_outcomes(first)
    with pytest.raises(InputError, match="there is no file or folder"):
        read_outcomes(tmp_path / "nowhere")
    broken = first / f"samples_mmlu_pro_law_{TIME}.jsonl"
    broken.write_text("{\n")
    with pytest.raises(InputError, match="is not readable JSON lines"):
        read_outcomes(first, second)
    broken.write_text("[1]\n")
    with pytest.raises(InputError, match="line 1: not a sample"):
        read_outcomes(first, second)


# ---- real results


@needs_assets
def test_real_results_of_the_harness() -> None:
    folder = ASSETS / "formats" / "lm_eval_mmlu_pro"
    outcomes = read_outcomes(folder / "meta-llama__Llama-3.1-8B", folder / "meta-llama__Llama-3.1-8B-Instruct")
    pairs = json.loads((ASSETS / "data" / "mmlu_pro" / "actual_change_pairs.json").read_text())
    names = [name for name in pairs[0]["domains"] if name != "ALL"]
    found = match_domains(names, outcomes.domains)
    assert list(found) == names
    for name in names:
        # The pairs file leaves out 31 questions whose answer was corrected later.
        assert outcomes.domains[found[name]].change == pytest.approx(pairs[0]["domains"][name]["delta"], abs=2e-3)
    # The stored samples are cut to five lines: the harness's own result stands.
    assert "mmlu_pro_history (5 of 381)" in outcomes.warnings[0]
    old = read_outcomes(ASSETS / "formats" / "lm_eval_mmlu_pro_v045", folder / "meta-llama__Llama-3.1-8B-Instruct")
    assert {k: v.change for k, v in old.domains.items()} == {k: v.change for k, v in outcomes.domains.items()}


@needs_assets
def test_real_results_of_2023() -> None:
    folder = ASSETS / "data" / "pythia_evals" / "evals" / "pythia-v1" / "pythia-1.4b-deduped"
    path = folder / "intervention" / "intervention-1.4b-deduped-long_step143000.json"
    outcomes = read_outcomes(folder / "zero-shot", path).domains
    assert len(outcomes) == 65
    assert sum(name.startswith("hendrycksTest-") for name in outcomes) == 57
    before, after = (json.loads(p.read_text())["results"] for p in (next((folder / "zero-shot").iterdir()), path))
    for name, outcome in outcomes.items():
        assert outcome.change == after[name]["acc"] - before[name]["acc"]
        assert outcome.stderr == pytest.approx(math.hypot(before[name]["acc_stderr"], after[name]["acc_stderr"]))


@needs_assets
def test_real_mmlu_pro_summaries() -> None:
    folder = ASSETS / "formats" / "mmlu_pro_official"
    outcomes = read_outcomes(folder / "Meta-Llama-3_1-8B-CoT-all_summary.txt", folder / "merged_summary.json").domains
    assert len(outcomes) == 14
    assert outcomes["computer science"].change == pytest.approx(367 / 410 - 0.3756)


@needs_assets
def test_real_answers_give_the_published_paired_errors(tmp_path: Path) -> None:
    """The eight real pairs, from answers in MMLU-Pro's layout, equal the numbers computed by another program."""
    folder = ASSETS / "data" / "mmlu_pro"
    with gzip.open(folder / "predictions.csv.gz", "rt") as file:
        table = list(csv.DictReader(file))
    for pair in json.loads((folder / "actual_change_pairs.json").read_text()):
        files = []
        for model in (pair["base"], pair["tuned"]):
            rows = [
                (row["category"], int(row["question_id"]), row["answer"],
                 "no idea" if row[model] == "-" else f"The answer is ({row[model]}).")
                for row in table if row[pair["base"]] and row[pair["tuned"]]
            ]  # fmt: skip
            files.append(official(tmp_path / f"{model}.json", rows))
        outcomes = read_outcomes(*files)
        assert outcomes.warnings == []
        for name, outcome in outcomes.domains.items():
            expected = pair["domains"][name]
            assert outcome.n == expected["n"]
            assert outcome.change == pytest.approx(expected["delta"], abs=1e-6)
            assert outcome.stderr == pytest.approx(expected["paired_stderr"], abs=1e-6)
