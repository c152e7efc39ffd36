"""Results of HELM: a folder per run with stats.json, run_spec.json and, by question, per_instance_stats.json."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sts_fast.errors import InputError
from sts_fast.files import Document
from sts_fast.outcomes.evaluation import (
    EvaluatedModel,
    Evaluation,
    Result,
    Task,
    count,
    finite,
    read_json,
    setting_text,
)

STATS_FILE, SPEC_FILE, BY_QUESTION_FILE = "stats.json", "run_spec.json", "per_instance_stats.json"
SPLITS = ("test", "valid")
MEAN_TOLERANCE = 1e-6


def recognises(document: Any) -> bool:
    """True for the list of stats.json."""
    return (
        isinstance(document, list)
        and len(document) > 0
        and all(isinstance(stat, dict) and isinstance(stat.get("name"), dict) and "count" in stat for stat in document)
    )


def read(path: Path, document: Any) -> Evaluation:
    """The unperturbed numbers of the test split, else of the validation split; run_spec.json names the task."""
    spec_path = path.with_name(SPEC_FILE)
    spec = read_json(spec_path) if spec_path.is_file() else None
    if not isinstance(spec, dict) or not isinstance(spec.get("name"), str):
        raise InputError(
            f"{path} needs {SPEC_FILE} of the same run beside it, which names its task: copy the whole folder"
        )
    adapter = spec.get("adapter_spec")
    adapter = adapter if isinstance(adapter, dict) else {}
    split = next((split for split in SPLITS if any(_is_plain(stat, split) for stat in document)), None)
    stats = {stat["name"]["name"]: stat for stat in document if _is_plain(stat, split)}
    n = count(_mean(stats.get("num_instances")))
    correct = _by_question(path.with_name(BY_QUESTION_FILE), split)
    results = {}
    for name, stat in stats.items():
        value = _mean(stat)
        if value is not None:
            results[name] = _with_questions(Result(value, name, n=n), correct.get(name, {}))
    if not results:
        raise InputError(
            f"{path} contains no metric of a test or validation split: give the run of a scenario that has one"
        )
    made = {
        key: value for key, value in adapter.items() if key not in ("model", "model_deployment", "max_train_instances")
    }
    made |= {"harness": "HELM", "task": _task_name(spec)}
    if "max_train_instances" in adapter:
        made["number of demonstrations"] = adapter["max_train_instances"]
    if n is not None:
        made["number of questions"] = n
    model = adapter.get("model") or adapter.get("model_deployment")
    task = Task(
        results, spec["name"], {key: setting_text(value) for key, value in made.items()},
        EvaluatedModel(str(model)) if model else None,
    )  # fmt: skip
    return Evaluation({_task_name(spec): task})


def _task_name(spec: Document) -> str:
    """'mmlu:law' of 'mmlu:subject=law,method=...,model=...': the scenario, and what it was made with."""
    scenario = spec.get("scenario_spec")
    arguments = scenario.get("args") if isinstance(scenario, dict) else None
    values = [str(value) for value in arguments.values()] if isinstance(arguments, dict) else []
    return ":".join([spec["name"].partition(":")[0], *values])


def _is_plain(stat: Document, split: str | None) -> bool:
    name = stat["name"]
    return (
        isinstance(name.get("name"), str)
        and name.get("split") == split
        and not name.get("perturbation")
        and not name.get("sub_split")
    )


def _mean(stat: Document | None) -> float | None:
    if stat is None:
        return None
    total, n = finite(stat.get("sum")), count(stat.get("count"))
    return total / n if total is not None and n else None


def _by_question(path: Path, split: str | None) -> dict[str, dict[str, float]]:
    """metric -> question -> value, the mean over draws of demonstrations; empty without the file."""
    if not path.is_file():
        return {}
    rows = read_json(path)
    values: dict[str, dict[str, list[float]]] = {}
    for row in rows if isinstance(rows, list) else ():
        for stat in _plain_stats(row, split):
            mean = _mean(stat)
            if mean is not None:
                values.setdefault(stat["name"]["name"], {}).setdefault(str(row.get("instance_id")), []).append(mean)
    return {
        metric: {question: float(np.mean(draws)) for question, draws in of_metric.items()}
        for metric, of_metric in values.items()
    }


def _plain_stats(row: Any, split: str | None) -> Iterable[Document]:
    if not isinstance(row, dict) or row.get("perturbation"):
        return []
    stats = row.get("stats")
    named = [stat for stat in stats if isinstance(stat, dict)] if isinstance(stats, list) else []
    return [stat for stat in named if isinstance(stat.get("name"), dict) and _is_plain(stat, split)]


def _with_questions(result: Result, correct: dict[str, float]) -> Result:
    """The result with its values by question, if these average to it."""
    if len(correct) < 2 or abs(float(np.mean(list(correct.values()))) - result.value) > MEAN_TOLERANCE:
        return result
    stderr = float(np.std(list(correct.values()), ddof=1) / np.sqrt(len(correct)))
    return replace(result, stderr=stderr, n=len(correct), correct=correct)
