"""Results of lighteval: results/ORG/MODEL/results_TIME.json, with tasks named 'suite|task|shots' or 'task|shots'.

With --save-details, details/ORG/MODEL/TIME/details_TASK_TIME.parquet has the values by question.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sts_fast.errors import InputError, listed, one_line
from sts_fast.files import Document
from sts_fast.outcomes.evaluation import EvaluatedModel, Evaluation, Result, Task, count, finite, setting_text
from sts_fast.outcomes.formats.lm_eval import SPEED, time_of

RESULTS_FOLDER, DETAILS_FOLDER = "results", "details"
MEAN_TOLERANCE = 1e-6
# The mean of a task's subsets, which lighteval adds.
AVERAGE = ":_average"
OF_CONFIG = ("max_samples", "num_fewshot_seeds", "model_dtype")
OF_TASK = (
    "prompt_function", "hf_repo", "hf_subset", "hf_revision", "evaluation_splits", "few_shots_split",
    "few_shots_select", "generation_size", "generation_grammar", "stop_sequence", "num_samples",
)  # fmt: skip
HASHES = {"hash_examples": "hash of the questions", "hash_input_tokens": "hash of the tokens of the prompts"}


def recognises(document: Any) -> bool:
    return (
        isinstance(document, dict)
        and isinstance(document.get("results"), dict)
        and isinstance(document.get("config_general"), dict)
    )


def read(path: Path, document: Document) -> Evaluation:
    """Every version since 2024; 'all', the mean over unlike tasks, is left out."""
    entries = {name: entry for name, entry in document["results"].items() if isinstance(entry, dict) and name != "all"}
    names = [_short_name(name) for name in entries]
    evaluation = Evaluation(time=time_of(path))
    undefined = []
    for name, entry in entries.items():
        short = _short_name(name)
        config = _config_of(document, name)
        n = count(config.get("effective_num_docs"))
        results = {}
        details = _read_details(path, name)
        for metric, value in entry.items():
            if metric.endswith("_stderr") or isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            if finite(value) is None:
                undefined.append(f"{metric} of {name}")
                continue
            better = _higher_is_better(config, metric)
            result = Result(float(value), metric, finite(entry.get(f"{metric}_stderr")), n, higher_is_better=better)
            results[metric] = details.added_to(result)
        members = ()
        if short.endswith(AVERAGE):
            short = short.removesuffix(AVERAGE)
            members = tuple(
                other for other in entries if _short_name(other).startswith(f"{short}:") and AVERAGE not in other
            )
        if results:
            shown = short if names.count(_short_name(name)) == 1 and short not in evaluation.tasks else name
            made = _made(document, name, config, n)
            evaluation.tasks[shown] = Task(results, name, made, _model_of(document), members)
    if not evaluation.tasks:
        raise InputError(f"{path} contains no metric of any task: give a results file of lighteval")
    if undefined:
        evaluation.warnings.append(f"{path}: not a number, and left out: {listed(undefined)}")
    return evaluation


def _short_name(name: str) -> str:
    """'leaderboard|mmlu:law|5' and 'mmlu:law|5' are mmlu:law."""
    parts = name.split("|")
    return parts[1] if len(parts) > 2 else parts[0]


def _shots(name: str) -> str | None:
    parts = name.split("|")
    shots = parts[2] if len(parts) > 2 else parts[-1]
    return shots if shots.isdigit() else None


def _config_of(document: Document, name: str) -> Document:
    """The block of config_tasks for a task, under its whole name or without the number of shots."""
    configs = document.get("config_tasks")
    if not isinstance(configs, dict):
        return {}
    config = configs.get(name, configs.get(name.rpartition("|")[0]))
    return config if isinstance(config, dict) else {}


def _higher_is_better(config: Document, metric: str) -> bool | None:
    metrics = config.get("metric", config.get("metrics"))
    for entry in metrics if isinstance(metrics, list) else ():
        if isinstance(entry, dict) and entry.get("metric_name") == metric:
            better = entry.get("higher_is_better")
            return better if isinstance(better, bool) else None
    return None


def _made(document: Document, name: str, config: Document, n: int | None) -> dict[str, str]:
    general = document["config_general"]
    made: dict[str, Any] = {"harness": "lighteval", "task": _short_name(name)}
    made |= {"number of demonstrations": _shots(name), "number of questions": n}
    versions = document.get("versions")
    made["version of the task"] = versions.get(name) if isinstance(versions, dict) else None
    of_model = general.get("model_config")
    of_model = of_model if isinstance(of_model, dict) else {}
    named = {"model_name", "pretrained", "revision", "tokenizer", "subfolder", "base_model", "adapter_weights"}
    made = {key: value for key, value in made.items() if value is not None}
    made |= {key: general[key] for key in OF_CONFIG if key in general}
    made |= {key: value for key, value in of_model.items() if key not in SPEED | named}
    made |= {key: config[key] for key in OF_TASK if key in config}
    summaries = document.get("summary_tasks")
    summary = summaries.get(name) if isinstance(summaries, dict) else None
    hashes = summary.get("hashes") if isinstance(summary, dict) else None
    if isinstance(hashes, dict):
        made |= {shown: hashes[key] for key, shown in HASHES.items() if hashes.get(key)}
    return {key: setting_text(value) for key, value in made.items()}


def _model_of(document: Document) -> EvaluatedModel | None:
    general = document["config_general"]
    of_model = general.get("model_config")
    of_model = of_model if isinstance(of_model, dict) else {}
    name = general.get("model_name") or of_model.get("model_name")
    if not name:
        return None
    # The commit that was read, in older versions, says no more than the name.
    revision, adapter = (of_model.get(key) for key in ("revision", "adapter_weights"))
    return EvaluatedModel(str(name), str(revision) if revision else None, str(adapter) if adapter else None)


# ---- values by question


@dataclass(frozen=True)
class _Details:
    """Of one task. values: metric -> value of each question, in the order of `questions`.

    questions: hash of each question with its number among equal ones; golds: right answer; prompts: hash of what was
    sent, empty where it is not stored
    """

    questions: list[str] = field(default_factory=list)
    golds: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=dict)

    def added_to(self, result: Result) -> Result:
        """The result with its values by question, if these average to it."""
        values = self.values.get(result.metric, [])
        if len(values) < 2 or abs(sum(values) / len(values) - result.value) > MEAN_TOLERANCE:
            return result
        return replace(
            result,
            n=len(values),
            correct=dict(zip(self.questions, values, strict=True)),
            key=dict(zip(self.questions, self.golds, strict=True)),
            prompt={question: prompt for question, prompt in zip(self.questions, self.prompts, strict=True) if prompt},
        )


def _read_details(results: Path, name: str) -> _Details:
    """Empty where the details were not saved, or are in another place."""
    parts = results.parent.parts
    if RESULTS_FOLDER not in parts:
        return _Details()
    at = len(parts) - 1 - parts[::-1].index(RESULTS_FOLDER)
    time = results.stem.removeprefix("results_")
    path = Path(*parts[:at], DETAILS_FOLDER, *parts[at + 1 :], time, f"details_{name}_{time}.parquet")
    if not path.is_file():
        return _Details()
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = ["doc.query", "doc.gold_index", "metric", "model_response.input"]
    try:
        rows = pq.ParquetFile(path).read(columns=columns).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path} cannot be read ({one_line(error)}): remove it, or evaluate again") from error
    details, seen = _Details(), dict[str, int]()
    for row in rows:
        doc, metrics, response = (row.get(column) or {} for column in ("doc", "metric", "model_response"))
        if not isinstance(doc.get("query"), str):  # a version with other columns: nothing tells the questions apart
            return _Details()
        question = _hash(doc["query"])
        seen[question] = seen.get(question, 0) + 1
        details.questions.append(f"{question} {seen[question]}")
        details.golds.append(str(doc.get("gold_index")))
        sent = response.get("input")
        details.prompts.append("" if sent is None else _hash(sent))
        for metric, value in metrics.items():
            number = float(value) if isinstance(value, bool) else finite(value)
            if number is not None:
                details.values.setdefault(metric, []).append(number)
    whole = {metric: values for metric, values in details.values.items() if len(values) == len(rows)}
    return replace(details, values=whole)


def _hash(content: Any) -> str:
    return hashlib.sha256(setting_text(content).encode()).hexdigest()[:16]
