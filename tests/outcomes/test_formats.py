"""Results of lighteval, HELM, OpenCompass and inspect, each as the harness writes them."""

from __future__ import annotations

import copy
import json
import math
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from evaluation_results import CASES, TIME, accuracies, write_results
from scipy import stats

from sts_fast.errors import InputError
from sts_fast.outcomes.evaluation import EvaluatedModel
from sts_fast.outcomes.outcomes import read_outcomes
from sts_fast.outcomes.read import read_evaluation
from sts_fast.outcomes.validate import validate

RECORDED = Path(__file__).parents[1] / "recorded" / "inspect"
needs_cases = pytest.mark.skipif(not CASES.is_dir(), reason="the situations from reports are not on this machine")

SCORES = {"law": 1.0, "math": 4.0, "physics": 3.0, "history": 2.0}
PAIRS = {
    "law": "professional_law",
    "math": "college_mathematics",
    "physics": "college_physics",
    "history": "leaderboard|mmlu:high_school_us_history|5",
}


# ---- lighteval


@needs_cases
def test_lighteval_is_read_from_its_tree() -> None:
    folder = CASES / "05_lighteval"
    outcomes = read_outcomes(folder / "b", folder / "a")
    changes = {name: outcome.change for name, outcome in outcomes.domains.items() if name != "mmlu"}
    assert changes == pytest.approx(
        {
            "mmlu:professional_law": 0.02, "mmlu:college_mathematics": 0.28, "mmlu:college_physics": 0.17,
            "mmlu:high_school_us_history": -0.05,
        }
    )  # fmt: skip
    assert outcomes.domains["mmlu:professional_law"].stderr == pytest.approx(math.hypot(0.03, 0.03))
    # `all` is the mean over everything, and no task; _average is the group mmlu.
    assert set(outcomes.members["mmlu"]) == set(changes)
    # The names are not those of the forecast, so the pairs are given.
    with pytest.raises(InputError, match=r"only 0 domains are in both.*--match DOMAIN=TASK"):
        validate(SCORES, before=folder / "b", after=folder / "a")
    result = validate(SCORES, before=folder / "b", after=folder / "a", match=PAIRS)
    assert {row.name: row.outcome.change for row in result.domains} == pytest.approx(
        {"law": 0.02, "math": 0.28, "physics": 0.17, "history": -0.05}
    )


def lighteval(folder: Path, shots: int, results: dict[str, Any], **general: Any) -> Path:
    path = folder / "results" / "org" / "model" / f"results_{TIME}.json"
    path.parent.mkdir(parents=True)
    document = {
        "config_general": {"model_name": "org/model", "max_samples": None, **general},
        "results": {**results, "all": {"acc": 0.5}},
        "versions": dict.fromkeys(results, 0),
        "config_tasks": {
            name: {
                "hf_repo": "x", "effective_num_docs": 40 * (1 + shots),
                "metrics": [{"metric_name": "rate", "higher_is_better": False}],
            } for name in results
        },
        "summary_tasks": {
            name: {"hashes": {"hash_examples": "aa", "hash_input_tokens": str(shots)}} for name in results
        },
    }  # fmt: skip
    path.write_text(json.dumps(document))
    return folder


def test_lighteval_of_two_shots_and_names_without_suite(tmp_path: Path) -> None:
    first = lighteval(
        tmp_path / "a", 0,
        {"gsm8k|0": {"extractive_match": 0.5, "extractive_match_stderr": 0.02}, "x|0": {"rate": 0.2}},
        model_config={"model_name": "org/model", "dtype": "bfloat16", "revision": "main"},
    )  # fmt: skip
    second = lighteval(
        tmp_path / "b", 5, {"lighteval|gsm8k|5|0": {"extractive_match": 0.4, "extractive_match_stderr": 0.01},
        "x|5": {"rate": 0.1}, "bad|5": {"acc": math.nan}}, max_samples=100,
        model_config={"model_name": "out/tuned", "dtype": "float16"},
    )  # fmt: skip
    outcomes = read_outcomes(first, second, metric=["extractive_match", "x=rate"])
    assert outcomes.domains["gsm8k"].change == pytest.approx(-0.1)
    # The harness says that a lower rate is better.
    assert outcomes.domains["x"].change == pytest.approx(0.1)
    assert any("lower is better for rate" in warning for warning in outcomes.warnings)
    assert any("not a number, and left out: acc of bad|5" in warning for warning in outcomes.warnings)
    (said,) = outcomes.mismatches
    for part in (
        "number of demonstrations is 0 before and 5 after", "max_samples is none before and 100 after",
        "number of questions is 40 before and 240 after", "hash of the tokens of the prompts is 0 before and 5 after",
        "dtype is bfloat16 before and float16 after",
    ):  # fmt: skip
        assert part in said
    both = lighteval(tmp_path / "c", 5, {"mmlu:law|0": {"acc": 0.5}, "mmlu:law|5": {"acc": 0.6}})
    assert set(read_evaluation(both).tasks) == {"mmlu:law|0", "mmlu:law|5"}


def test_details_of_lighteval_pair_the_questions(tmp_path: Path) -> None:
    """In another order, with a question that occurs twice, and with prompts that differ."""
    before, after = [1.0, 0, 0, 1, 0], [1.0, 1, 0, 1, 1]
    folders = []
    for name, right, order in (("a", before, [0, 1, 2, 3, 4]), ("b", after, [4, 3, 1, 0, 2])):
        entry = {"acc": sum(right) / 5, "acc_stderr": 0.2}
        folders.append(lighteval(tmp_path / name, 0, {"leaderboard|arc:easy|0": entry}))
        details = folders[-1] / "details" / "org" / "model" / TIME
        details.mkdir(parents=True)
        rows = [
            {
                "doc": {"query": f"q{min(i, 3)}", "gold_index": [1], "choices": ["x", "y"]},
                "metric": {"acc": right[i]},
                "model_response": {"input": f"Answer: q{i}", "text": ["y"]},
            }
            for i in order
        ]
        path = details / f"details_leaderboard|arc:easy|0_{TIME}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)
    # Questions 3 and 4 are the same; the first of them before is the second after.
    outcomes = read_outcomes(*folders)
    assert outcomes.mismatches[-1].endswith("not paired by question: arc:easy (2 of 5 questions)")
    for row in rows:
        row["model_response"] = {"input": None, "text": ["y"]}
    pq.write_table(pa.Table.from_pylist(rows), path)
    outcome = read_outcomes(*folders).domains["arc:easy"]
    assert (outcome.paired, outcome.n, outcome.change) == (True, 5, pytest.approx(0.4))
    assert outcome.stderr == pytest.approx(stats.sem(np.subtract([1, 1, 0, 1, 1], before)))
    # Values that are not those of the results are not used.
    rows[0]["metric"]["acc"] = 0.0
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert read_outcomes(*folders).domains["arc:easy"].paired is False
    pq.write_table(
        pa.Table.from_pylist([{"full_prompt": f"q{i}", "metric": {"acc": after[i]}} for i in range(5)]), path
    )
    assert read_outcomes(*folders).domains["arc:easy"].paired is False
    path.write_bytes(b"PAR1")
    with pytest.raises(InputError, match="cannot be read"):
        read_outcomes(*folders)


# ---- HELM


def helm(folder: Path, subject: str, right: list[float], *, shots: int = 5, by_question: bool = True) -> None:
    """A run with one draw of demonstrations, and numbers of perturbed questions and of training beside it."""
    run = folder / f"mmlu:subject={subject},method=multiple_choice_joint,model=org_base"
    run.mkdir(parents=True)
    spec = {
        "name": run.name,
        "scenario_spec": {"class_name": "helm.MMLUScenario", "args": {"subject": subject}},
        "adapter_spec": {
            "method": "multiple_choice_joint", "model": "org/base", "max_train_instances": shots, "temperature": 0.0
        },
    }  # fmt: skip
    value = float(np.mean(right))

    def stat(name: str, mean: float, **more: Any) -> dict[str, Any]:
        return {"name": {"name": name, "split": "test", **more}, "count": 1, "sum": mean, "mean": mean}

    statistics = [
        stat("exact_match", value),
        stat("exact_match", 0.0, perturbation={"name": "robustness"}),
        stat("exact_match", 0.0, split="train"),
        stat("quasi_exact_match", value + 0.01),
        stat("num_instances", len(right)),
    ]
    (run / "stats.json").write_text(json.dumps(statistics))
    (run / "run_spec.json").write_text(json.dumps(spec))
    if by_question:
        rows = [
            {"instance_id": f"id{i}", "train_trial_index": 0, "stats": [stat("exact_match", x)]}
            for i, x in enumerate(right)
        ]
        rows.append({"instance_id": "id0", "perturbation": {"name": "x"}, "stats": [stat("exact_match", 0.0)]})
        (run / "per_instance_stats.json").write_text(json.dumps(rows))


def test_a_suite_of_helm_is_paired_by_question(tmp_path: Path) -> None:
    before, after = [1.0, 0, 1, 0, 0, 1], [1.0, 1, 1, 0, 1, 1]
    for subject in ("anatomy", "philosophy"):
        helm(tmp_path / "a" / "runs" / "suite", subject, before)
        helm(tmp_path / "b" / "runs" / "suite", subject, after, shots=0, by_question=subject == "anatomy")
    outcomes = read_outcomes(tmp_path / "a", tmp_path / "b")
    assert set(outcomes.domains) == {"mmlu:anatomy", "mmlu:philosophy"}
    anatomy = outcomes.domains["mmlu:anatomy"]
    assert (anatomy.before, anatomy.after, anatomy.n) == (0.5, pytest.approx(5 / 6), 6)
    assert anatomy.stderr == pytest.approx(stats.sem(np.subtract(after, before)))
    assert anatomy.metric == "exact_match"
    assert outcomes.domains["mmlu:philosophy"].stderr is None
    assert outcomes.mismatches == [
        "before and after were evaluated differently: number of demonstrations is 5 before and 0 after"
    ]
    assert outcomes.models == (EvaluatedModel("org/base"), EvaluatedModel("org/base"))
    alone = next((tmp_path / "a").rglob("*anatomy*"))
    assert list(read_evaluation(alone).tasks) == ["mmlu:anatomy"]
    (alone / "run_spec.json").unlink()
    with pytest.raises(InputError, match=r"needs run_spec\.json of the same run beside it"):
        read_evaluation(alone / "stats.json")


# ---- OpenCompass

ROWS = [
    ("dataset", "version", "metric", "mode", "my-model"),
    ("lukaemon_mmlu_law", "abc123", "accuracy", "ppl", "31.00"),
    ("math", "def456", "accuracy", "gen", "0.80"),
    ("physics", "-", "-", "-", "-"),
    ("code", "fff000", "humaneval_pass@1", "gen", "12.20"),
]


def opencompass(path: Path, rows: list[tuple[str, ...]]) -> Path:
    """The summary as DefaultSummarizer writes it, of the kind that the name ends with."""
    csv = "\n".join(",".join(row) for row in rows) + "\n"
    line = "|" + " | ".join("-----" for _ in rows[0]) + "|\n"
    table = "".join(f"| {' | '.join(row)} |\n" + (line if i == 0 else "") for i, row in enumerate(rows))
    shown = "\n".join("  ".join(cell.ljust(18) for cell in row) for row in rows)
    text = (
        f"20250501_120000\ntabulate format\n{'^' * 128}\n{shown}\n{'$' * 128}\n\n{'-' * 128} THIS IS A DIVIDER "
        f"{'-' * 128}\n\ncsv format\n{'^' * 128}\n{csv}{'$' * 128}\n\n"
        f"markdown format\n{'^' * 128}\n{table}\n{'$' * 128}\n"
        f"raw format\n{'^' * 128}\nModel: my-model\nmath: {{'accuracy': 0.8}}\n{'$' * 128}\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text({".csv": csv, ".md": table, ".txt": text}[path.suffix])
    return path


@pytest.mark.parametrize("suffix", [".csv", ".md", ".txt"])
def test_a_summary_of_opencompass_is_in_percent(tmp_path: Path, suffix: str) -> None:
    path = opencompass(tmp_path / f"summary_20250501_120000{suffix}", ROWS)
    evaluation = read_evaluation(path)
    assert list(evaluation.tasks) == ["lukaemon_mmlu_law", "math", "code"]
    assert evaluation.models == [EvaluatedModel("my-model")]
    assert evaluation.warnings == [f"{path} has no value, and leaves out physics"]
    assert read_evaluation(tmp_path).tasks == evaluation.tasks
    other = opencompass(
        tmp_path / "b" / path.name,
        [ROWS[0], ("mmlu_law", "abc123", "accuracy", "gen", "33.50"), *ROWS[2:4], (*ROWS[4][:4], "0.00")],
    )
    outcomes = read_outcomes(path, other)
    # .80 of 100 is a percentage too: the harness writes no shares.
    assert outcomes.domains["math"].before == pytest.approx(0.008)
    assert outcomes.domains["lukaemon_mmlu_law"].change == pytest.approx(0.025)
    assert outcomes.domains["code"].change == pytest.approx(-0.122)
    assert "mode is ppl before and gen after in lukaemon_mmlu_law" in outcomes.mismatches[0]
    # Its percentages are its own scale, and nothing to warn of.
    assert outcomes.warnings == [f"{file} has no value, and leaves out physics" for file in (path, other)] + [
        *outcomes.mismatches
    ]


@needs_cases
def test_the_case_of_opencompass() -> None:
    values = {"lukaemon_mmlu_law": 0.31, "math": 0.42, "history": 0.551}
    outcomes = read_outcomes(CASES / "10_opencompass", CASES / "09_csv_percent_fraction" / "a.csv")
    assert {name: outcome.before for name, outcome in outcomes.domains.items()} == pytest.approx(values)
    assert outcomes.domains["lukaemon_mmlu_law"].change == pytest.approx(0.33 - 0.31)


def test_one_summary_of_two_models(tmp_path: Path) -> None:
    path = opencompass(tmp_path / "summary_1.csv", [(*ROWS[0], "tuned"), (*ROWS[1], "32.0"), (*ROWS[2], "-")])
    with pytest.raises(
        InputError, match=r"contains the models my-model, tuned: choose one, as .*summary_1\.csv:my-model"
    ):
        read_outcomes(path, path)
    for place in (path, tmp_path):
        outcomes = read_outcomes(f"{place}:my-model", f"{place}:tuned")
        assert outcomes.domains["lukaemon_mmlu_law"].change == pytest.approx(0.01)
        assert outcomes.models == (EvaluatedModel("my-model"), EvaluatedModel("tuned"))
    with pytest.raises(InputError, match="contains the models my-model, tuned"):
        read_outcomes(f"{path}:other", path)
    with pytest.raises(InputError, match="alone contains no change"):
        read_outcomes(path)
    (tmp_path / "x.csv").write_text("domain,accuracy\nlaw,.5\n")
    with pytest.raises(InputError, match="is no summary of OpenCompass"):
        read_outcomes(f"{tmp_path / 'x.csv'}:law", path)


def test_faults_of_summaries(tmp_path: Path) -> None:
    words = opencompass(tmp_path / "summary_2.csv", [ROWS[0], (*ROWS[1][:4], "high")])
    with pytest.raises(InputError, match="the value of lukaemon_mmlu_law is 'high', not a number"):
        read_evaluation(words)
    none = opencompass(tmp_path / "summary_3.csv", [ROWS[0], ROWS[3]])
    with pytest.raises(InputError, match="has no dataset with a value"):
        read_evaluation(none)
    cut = opencompass(tmp_path / "summary_4.csv", [ROWS[0], ROWS[1][:4]])
    with pytest.raises(InputError, match="the row of 'lukaemon_mmlu_law' has 4 cells, not 5"):
        read_evaluation(cut)


# ---- inspect


def test_logs_that_inspect_wrote() -> None:
    """See record_inspect.py for the answers; values by question are means over two epochs."""
    before, after = [1.0, 0, 0.5, 0, 0.5], [1.0, 1, 1, 0, 0.5]
    outcomes = read_outcomes(RECORDED / "before.eval", RECORDED / "after.eval")
    law = outcomes.domains["law"]
    assert (law.before, law.after, law.n) == (pytest.approx(0.4), pytest.approx(0.7), 5)
    assert law.stderr == pytest.approx(stats.sem(np.subtract(after, before)))
    assert (law.paired, law.metric) == (True, "accuracy,match")
    assert outcomes.mismatches == [
        "before and after were evaluated differently: argument fewshot of the task is 0 before and 2 after"
    ]
    result = read_evaluation(RECORDED / "before.eval").tasks["law"].results["accuracy,includes"]
    assert result.stderr == pytest.approx(stats.sem(before))


def inspect_document(right: list[float], **spec: Any) -> dict[str, Any]:
    mean = sum(right) / len(right)
    metrics = {"accuracy": {"name": "accuracy", "value": mean}, "stderr": {"name": "stderr", "value": 0.1}}
    return {
        "version": 2,
        "status": "success",
        "eval": {
            "task": "inspect_evals/law", "created": "2025-05-01T10:00:00+00:00", "model": "hf/org/base",
            "model_args": {}, "config": {"limit": None, "epochs": 1}, "task_args": {},
            "dataset": {"samples": len(right)}, **spec,
        },
        "results": {"completed_samples": len(right), "scores": [{"name": "choice", "metrics": metrics}]},
        "samples": [
            {"id": f"q{i}", "epoch": 1, "input": f"q{i}?", "target": "A", "scores": {"choice": {"value": "CI"[x < 1]}}}
            for i, x in enumerate(right)
        ],
    }  # fmt: skip


def zipped(path: Path, document: dict[str, Any], *, zstandard: bool) -> Path:
    """The log as .eval; zstandard: its members by the compression number 93, which Python 3.11 cannot write."""
    members = {"header.json": {**document, "samples": None}, "summaries.json": document["samples"]}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED if zstandard else zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            text = json.dumps(content).encode()
            archive.writestr(name, pa.compress(text, "zstd", asbytes=True) if zstandard else text)
            if zstandard:
                info = archive.getinfo(name)
                info.compress_type, info.file_size, info.CRC = 93, len(text), zlib.crc32(text)
    return path


@pytest.mark.parametrize("kind", ["json", "deflated", "zstandard"])
def test_every_form_of_a_log(tmp_path: Path, kind: str) -> None:
    before, after = [1.0, 0, 1, 0], [1.0, 1, 1, 0]
    paths = []
    for name, right, model in (("a", before, "hf/org/base"), ("b", after, "vllm/out/tuned")):
        document = inspect_document(right, model=model)
        if kind == "json":
            paths.append(tmp_path / f"{name}.json")
            paths[-1].write_text(json.dumps(document))
        else:
            paths.append(zipped(tmp_path / f"{name}.eval", document, zstandard=kind == "zstandard"))
    outcomes = read_outcomes(*paths)
    assert outcomes.domains["law"].change == pytest.approx(0.25)
    assert outcomes.domains["law"].stderr == pytest.approx(stats.sem([0, 1, 0, 0]))
    assert outcomes.models == (EvaluatedModel("org/base"), EvaluatedModel("out/tuned"))
    assert outcomes.mismatches == []


def test_a_folder_of_logs(tmp_path: Path) -> None:
    """The newest log of a task is read, one that did not end is named, and tasks with other arguments are others."""
    zipped(tmp_path / "1.eval", inspect_document([1.0, 0]), zstandard=False)
    later = {"created": "2025-05-02T10:00:00+00:00"}
    zipped(tmp_path / "2.eval", inspect_document([1.0, 1], **later), zstandard=False)
    zipped(tmp_path / "3.eval", {**inspect_document([0.0, 0]), "status": "cancelled"}, zstandard=False)
    evaluation = read_evaluation(tmp_path)
    assert evaluation.tasks["law"].results["accuracy,choice"].value == 1.0
    assert any("did not end (status: cancelled)" in warning for warning in evaluation.warnings)
    assert f"{tmp_path}: the newest of 2 results is taken of law" in evaluation.warnings
    subjects = inspect_document([1.0, 0], task_args={"subject": "tort"}, task_args_passed={"subject": "tort"})
    zipped(tmp_path / "4.eval", subjects, zstandard=False)
    assert set(read_evaluation(tmp_path).tasks) == {"inspect_evals/law", "inspect_evals/law (subject=tort)"}

    with zipfile.ZipFile(tmp_path / "5.eval", "w") as archive:
        archive.writestr("_journal/start.json", "{}")
    with pytest.raises(InputError, match="has not ended: wait for it, or run inspect eval-retry"):
        read_evaluation(tmp_path / "5.eval")
    (tmp_path / "6.eval").write_bytes(b"PK no archive")
    with pytest.raises(InputError, match="is not a readable log of inspect"):
        read_evaluation(tmp_path / "6.eval")
    partly = inspect_document([1.0, 0])
    partly["results"]["total_samples"] = 3
    said = read_evaluation(zipped(tmp_path / "8.eval", partly, zstandard=False)).warnings
    assert said == [f"{tmp_path / '8.eval'} has results of 2 of 3 samples: the others failed"]
    bad = zipped(tmp_path / "9.eval", {**inspect_document([0.0]), "invalidated": True}, zstandard=False)
    with pytest.raises(InputError, match="is marked as invalidated"):
        read_evaluation(bad)
    alone = zipped(tmp_path / "7.eval", {**inspect_document([0.0]), "status": "error"}, zstandard=False)
    with pytest.raises(InputError, match=r"contains no results \(.*status: error"):
        read_evaluation(alone)


# ---- anything missing or of another type


def paths_in(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key, value in document.items() if isinstance(document, dict) else enumerate(document):
        yield (*path, key)
        if isinstance(value, (dict, list)) and value:
            yield from paths_in(value, (*path, key))


@pytest.mark.parametrize("harness", ["lm-eval", "lighteval", "HELM", "inspect"])
def test_a_damaged_file_is_read_or_refused_in_one_sentence(tmp_path: Path, harness: str) -> None:
    for name in "ab":
        if harness == "lm-eval":
            blocks = {
                "group_subtasks": {"x": ["law"]},
                "n-samples": {"law": {"effective": 3}},
                "task_hashes": {"law": "x"},
            }
            write_results(tmp_path / name, accuracies(law=0.3, x=0.4), **blocks)
        elif harness == "lighteval":
            lighteval(
                tmp_path / name, 0, {"mmlu:law|0": {"acc": 0.2}, "mmlu:_average|0": {"acc": 0.2}}, model_config={}
            )
        elif harness == "HELM":
            helm(tmp_path / name, "law", [1.0, 0, 1])
        else:
            (tmp_path / f"{name}.json").write_text(json.dumps(inspect_document([1.0, 0, 1])))
    places = [tmp_path / name if (tmp_path / name).exists() else tmp_path / f"{name}.json" for name in "ab"]
    said = []
    odd = ["text", 5, None, {}, [1], True, math.nan, -1, [{}], {"a": 1}]
    files = [places[0]] if places[0].is_file() else sorted(places[0].rglob("*.json"))
    for file in files:
        document = json.loads(file.read_text())
        for number, path in enumerate(paths_in(document)):
            for value in (odd[number % len(odd)], odd[(3 * number + 4) % len(odd)], "left out"):
                broken = copy.deepcopy(document)
                *parents, last = path
                holder = broken
                for key in parents:
                    holder = holder[key]
                if value == "left out":
                    del holder[last]
                else:
                    holder[last] = value
                file.write_text(json.dumps(broken))
                try:
                    read_outcomes(*places)
                except InputError as error:
                    said.append(str(error))
        file.write_text(json.dumps(document))
    assert said
    assert not any("\n" in text for text in said)


def test_harnesses_of_different_names_are_told_apart(tmp_path: Path) -> None:
    first = zipped(tmp_path / "1.eval", inspect_document([1.0, 0]), zstandard=False)
    lighteval(tmp_path / "b", 0, {"law|0": {"accuracy,choice": 0.5}})
    (said,) = read_outcomes(first, tmp_path / "b").mismatches
    assert "harness is inspect-ai before and lighteval after" in said
    with pytest.raises(InputError, match="contains results of several harnesses"):
        read_evaluation(tmp_path)
