"""Evaluations that were made differently, or of another model than the forecast's."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
from evaluation_results import CASES, accuracies, write_results, write_samples
from scipy import stats

from sts_fast.errors import InputError
from sts_fast.outcomes.differences import ForecastModel, other_models, same_name
from sts_fast.outcomes.evaluation import EvaluatedModel
from sts_fast.outcomes.formats.lm_eval import prompt_hash
from sts_fast.outcomes.outcomes import read_outcomes
from sts_fast.outcomes.validate import validate

ASSETS = CASES.with_name("assets")
needs_assets = pytest.mark.skipif(not ASSETS.is_dir(), reason="the real evaluation results are not on this machine")
needs_cases = pytest.mark.skipif(not CASES.is_dir(), reason="the situations from reports are not on this machine")

BEFORE = accuracies(law=0.31, math=0.42, physics=0.28, history=0.55)
AFTER = accuracies(law=0.33, math=0.70, physics=0.45, history=0.50)
SCORES = {"law": 1.0, "math": 4.0, "physics": 3.0, "history": 2.0}


@needs_cases
def test_other_shots_template_version_and_limit_are_named() -> None:
    folder = CASES / "01_lmeval_other_nshot"
    (said,) = read_outcomes(folder / "b", folder / "a").mismatches
    assert said.startswith("before and after were evaluated differently: ")
    for part in (
        "number of demonstrations is 5 before and 0 after",
        "chat template is none before and f00 after",
        "version of the task is 1 before and 2 after",
        "limit is none before and 0.1 after",
        "fewshot_as_multiturn is false before and true after",
    ):
        assert part in said
    with pytest.raises(InputError, match=r"number of demonstrations is 5 before and 0 after.*\(--strict\)") as caught:
        validate(SCORES, before=folder / "b", after=folder / "a", strict=True)
    assert "\n" not in str(caught.value)
    assert said in validate(SCORES, before=folder / "b", after=folder / "a").warnings


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"task": {"generation_kwargs": {"temperature": 0.7}}},
            'generation_kwargs is {"temperature": 0} before and {"t',
        ),
        ({"task": {"filter_list": [{"name": "loose"}]}}, "filter_list is "),
        ({"task": {"description": "Think."}}, "description is empty before and Think. after"),
        (
            {"config": {"model_args": "pretrained=org/tuned,dtype=float32"}},
            "dtype is bfloat16 before and float32 after",
        ),
        ({"config": {"fewshot_seed": 7}}, "fewshot_seed is 1234 before and 7 after"),
        ({"config": {"gen_kwargs": "top_p=0.9"}}, "gen_kwargs is none before and top_p=0.9 after"),
        ({"config": {"model": "vllm"}}, "model type is hf before and vllm after"),
        ({"system_instruction": "Be brief."}, "system instruction is none before and Be brief. after"),
        ({"chat_template": "{{ x }}", "chat_template_sha": None}, "chat template is none before and {{ x }} after"),
        ({"task_hashes": {"law": "ffff"}}, "hash of the questions and prompts is abcd before and ffff after in law"),
        ({"n-samples": {"math": {"effective": 20}}}, "number of questions is 200 before and 20 after in math"),
    ],
)
def test_every_setting_that_differs_is_named_with_both_values(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    same: dict[str, Any] = {
        "task": {"generation_kwargs": {"temperature": 0.0}, "filter_list": [{"name": "none"}], "description": ""},
        "config": {"gen_kwargs": None},
        "task_hashes": {"law": "abcd"},
        "n-samples": {"math": {"effective": 200}},
    }
    first = write_results(tmp_path / "a", BEFORE, **same)
    other = {key: {**same[key], **value} if key in same else value for key, value in changes.items()}
    second = write_results(tmp_path / "b", AFTER, model="org/tuned", **{**same, **other})
    (text,) = read_outcomes(first, second).mismatches
    assert said in text
    assert text.count(" before and ") == 1


def test_what_says_nothing_of_the_evaluation_is_not_named(tmp_path: Path) -> None:
    """The model, where it runs, places in memory, and keys that only one version writes."""
    first = write_results(
        tmp_path / "a", BEFORE, task={"process_docs": "<function docs at 0x7f01>", "metadata": {"x": 1}},
        config={"model_args": "pretrained=org/base,device_map=auto,batch_size=8"}, versions=dict.fromkeys(BEFORE, "1"),
    )  # fmt: skip
    second = write_results(
        tmp_path / "b", AFTER, task={"process_docs": "<function docs at 0x7f99>", "unsafe_code": False},
        config={"model_args": {"pretrained": "out/final", "batch_size": 1}, "device": "cuda"},
    )  # fmt: skip
    outcomes = read_outcomes(first, second)
    assert outcomes.mismatches == []
    assert outcomes.warnings == []


def test_a_setting_of_other_values_in_every_task_is_named_once(tmp_path: Path) -> None:
    hashes = [{name: f"{name} {when}" for name in BEFORE} for when in ("old", "new")]
    first = write_results(tmp_path / "a", BEFORE, task_hashes=hashes[0], versions=dict.fromkeys(BEFORE, "2.0"))
    second = write_results(tmp_path / "b", AFTER, task_hashes=hashes[1], versions=dict.fromkeys(BEFORE, 2.0))
    assert read_outcomes(first, second).mismatches == [
        "before and after were evaluated differently: hash of the questions and prompts is law old before and law new "
        "after in law, and differs otherwise in math, physics, history"
    ]


def test_tasks_that_are_shown_by_one_name_are_told_apart(tmp_path: Path) -> None:
    """The alias of MMLU's law and of MMLU-Pro's is the same, and so is that of two ways to ask GSM8K."""
    names = {"mmlu_law": "law", "gsm8k": "gsm8k", "physics": "physics"}
    others = {"mmlu_pro_law": "law", "gsm8k_cot": "gsm8k", "physics": "physics"}
    folders = [
        write_results(tmp_path / folder, {name: {"alias": alias, "acc,none": 0.5} for name, alias in tasks.items()})
        for folder, tasks in (("a", names), ("b", others))
    ]
    (said,) = read_outcomes(*folders).mismatches
    assert "task is mmlu_law before and mmlu_pro_law after in law, and differs otherwise in gsm8k" in said
    (tmp_path / "a.csv").write_text("domain,accuracy\nmmlu_law,.5\n")
    (tmp_path / "b.csv").write_text("domain,accuracy\nmmlu_pro_law,.5\n")
    with pytest.raises(InputError, match="have no domain in common"):
        read_outcomes(tmp_path / "a.csv", tmp_path / "b.csv")


def test_long_settings_are_shown_where_they_part(tmp_path: Path) -> None:
    text = "The following are multiple choice questions. " * 9
    first = write_results(tmp_path / "a", BEFORE, task={"description": text + "Answer with a letter."})
    second = write_results(tmp_path / "b", AFTER, task={"description": text + "Think step by step."})
    (said,) = read_outcomes(first, second).mismatches
    assert "Answer with a letter.' before and" in said
    assert "Think step by step.' after" in said
    assert len(said) < 300


def test_different_prompts_are_never_paired(tmp_path: Path) -> None:
    law = [1.0, 0, 1, 1, 0, 1, 0, 0], [1.0, 1, 1, 1, 0, 0, 1, 1]
    means = sum(law[0]) / 8, sum(law[1]) / 8
    folders = []
    for name, right, mean in (("a", law[0], means[0]), ("b", law[1], means[1])):
        entry = {"law": {"alias": "law", "acc,none": mean, "acc_stderr,none": float(stats.sem(right))}}
        folders.append(write_results(tmp_path / name, entry))
        write_samples(folders[-1], "law", right)
    paired = read_outcomes(*folders)
    assert paired.domains["law"].paired
    assert paired.mismatches == []

    write_samples(folders[1], "law", law[1], prompts="p behind another template")
    outcomes = read_outcomes(*folders)
    outcome = outcomes.domains["law"]
    assert outcome.paired is False
    assert outcome.change == pytest.approx(means[1] - means[0])
    assert outcome.stderr == pytest.approx(math.hypot(stats.sem(law[0]), stats.sem(law[1])))
    assert outcomes.mismatches == [
        "the prompts before and after differ, so that the change is not paired by question: law (8 of 8 questions)"
    ]

    one_of_them = (folders[1] / f"samples_law_{'2025-05-01T10-00-00.000000'}.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in one_of_them]
    for row in rows[1:]:
        row["prompt_hash"] = f"p{row['doc_id']}"
    (folders[1] / "samples_law_2025-05-01T10-00-00.000000.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (said,) = read_outcomes(*folders).mismatches
    assert said.endswith("law (1 of 8 questions)")


def test_prompts_of_versions_without_their_hash_are_compared(tmp_path: Path) -> None:
    """As lists of arguments, as older versions write them, beside the hash of newer ones."""
    right = [1.0, 0.0, 1.0]
    entry = {"law": {"alias": "law", "acc,none": sum(right) / 3, "acc_stderr,none": 0.3}}
    folders = [write_results(tmp_path / name, entry) for name in "ab"]
    for folder, prompt in zip(folders, ("Question {}: ", "Question {}: "), strict=True):
        rows = [
            {
                "doc_id": i,
                "doc_hash": f"q{i}",
                "acc": x,
                "arguments": [[prompt.format(i), " yes"], [prompt.format(i), "no"]],
            }
            for i, x in enumerate(right)
        ]
        write_rows(folder, rows)
    assert read_outcomes(*folders).domains["law"].paired
    hashed = [
        {
            "doc_id": i,
            "doc_hash": f"q{i}",
            "acc": x,
            "prompt_hash": hashlib.sha256(f"Question {i}: ".encode()).hexdigest(),
        }
        for i, x in enumerate(right)
    ]
    write_rows(folders[1], hashed)
    assert read_outcomes(*folders).domains["law"].paired
    write_rows(folders[1], [{**row, "arguments": {"gen_args_0": {"arg_0": "<|user|> Question"}}} for row in rows])
    assert read_outcomes(*folders).domains["law"].paired is False


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    text = "\n".join(map(json.dumps, rows))
    (folder / "samples_law_2025-05-01T10-00-00.000000.jsonl").write_text(text)


@needs_assets
def test_the_hash_of_a_real_prompt_is_that_of_the_harness() -> None:
    (path, *_) = sorted((ASSETS / "formats" / "lm_eval_mmlu_pro").rglob("samples_*.jsonl"))
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    assert samples
    for sample in samples:
        assert prompt_hash(sample["arguments"]) == sample["prompt_hash"]


# ---- models


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("meta-llama/Llama-3.1-8B", "meta-llama/llama-3.1-8b", True),
        ("meta-llama__Llama-3.1-8B", "meta-llama/Llama-3.1-8B", True),
        ("/models/Llama-3.1-8B/", "meta-llama/Llama-3.1-8B", True),
        ("~/hub/models--meta-llama--Llama-3.1-8B/snapshots/0e9e39f249a1", "meta-llama/Llama-3.1-8B", True),
        ("./base", "/models/base", True),
        ("unsloth/Llama-3.1-8B", "meta-llama/Llama-3.1-8B", False),
        ("/models/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B", False),
        ("/out/law/checkpoint-500", "/out/math/checkpoint-500", False),
        ("/out/law/final", "/mnt/other/law/final", True),
        ("gpt2", "openai-community/gpt2", True),
    ],
)
def test_names_of_one_model(first: str, second: str, same: bool) -> None:
    assert same_name(first, second) == same_name(second, first) == same


def models(before: EvaluatedModel | None, after: EvaluatedModel | None, run: ForecastModel) -> list[str]:
    return list(other_models(before, after, run))


def test_an_evaluation_of_another_model_is_named() -> None:
    run = ForecastModel("org/base", "main")
    base, tuned = EvaluatedModel("org/base"), EvaluatedModel("out/tuned")
    assert models(base, tuned, run) == []
    assert models(None, tuned, run) == []
    assert models(EvaluatedModel("org/base-instruct"), tuned, run) == [
        "the evaluation before training is of org/base-instruct, but the forecast is of org/base"
    ]
    assert models(tuned, base, run) == [
        "the evaluation before training is of out/tuned, but the forecast is of org/base; the one after training names "
        "it: are they swapped?"
    ]
    (same,) = models(base, base, run)
    assert same == "the evaluations before and after training both name the model org/base"
    # A revision or an adapter is part of which model it is.
    (said,) = models(EvaluatedModel("org/base", revision="step1000"), tuned, run)
    assert "is of org/base (revision step1000), but the forecast is of org/base" in said
    (said,) = models(EvaluatedModel("org/base", adapter="out/lora"), tuned, run)
    assert "is of org/base (with out/lora), but the forecast is of org/base" in said
    assert models(base, EvaluatedModel("org/base", adapter="out/lora"), run) == []
    commit = ForecastModel("org/base", "0e9e39f249a16976918f6564b8830bc894c89659")
    assert models(EvaluatedModel("org/base", "0e9e39f"), tuned, commit) == []
    assert len(models(EvaluatedModel("org/base", "1111111"), tuned, commit)) == 1


def test_the_tuned_model_is_the_one_that_the_forecast_was_given() -> None:
    run, base = ForecastModel("org/base", tuned="/out/law/final"), EvaluatedModel("org/base")
    assert models(base, EvaluatedModel("out/law/final"), run) == []
    assert models(base, EvaluatedModel("org/base", adapter="/out/law/final"), run) == []
    assert models(base, EvaluatedModel("/out/math/final"), run) == [
        "the evaluation after training is of /out/math/final, but the forecast was made with --tuned /out/law/final"
    ]


def test_a_run_is_held_against_the_model_of_the_results(tmp_path: Path) -> None:
    run: dict[str, Any] = {
        "model": {"name": "/models/base", "revision": None},
        "settings": {"tuned": None},
        "domains": [
            {"name": name, "scores": {"act": {"value": value, "ci": [value, value]}}} for name, value in SCORES.items()
        ],
    }
    first = write_results(tmp_path / "a", BEFORE, model="org/other")
    second = write_results(tmp_path / "b", AFTER, model="out/tuned")
    said = "the evaluation before training is of org/other, but the forecast is of /models/base"
    assert said in validate(run, before=first, after=second).warnings
    with pytest.raises(InputError, match=r"is of org/other, but the forecast is of /models/base \(--strict\)"):
        validate(run, before=first, after=second, strict=True)
    fitting = write_results(tmp_path / "c", BEFORE, model="org/base")
    assert validate(run, before=fitting, after=second, strict=True).domains
