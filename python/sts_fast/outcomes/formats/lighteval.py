"""Results of lighteval: results/ORG/MODEL/results_TIME.json, with tasks named 'suite|task|shots' or 'task|shots'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sts_fast.errors import InputError, listed
from sts_fast.files import Document
from sts_fast.outcomes.evaluation import EvaluatedModel, Evaluation, Result, Task, count, finite, setting_text
from sts_fast.outcomes.formats.lm_eval import SPEED, time_of

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
        for metric, value in entry.items():
            if metric.endswith("_stderr") or isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            if finite(value) is None:
                undefined.append(f"{metric} of {name}")
                continue
            better = _higher_is_better(config, metric)
            results[metric] = Result(
                float(value), metric, finite(entry.get(f"{metric}_stderr")), n, higher_is_better=better
            )
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
    made: dict[str, Any] = {"harness": "lighteval", "number of demonstrations": _shots(name), "number of questions": n}
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
    return EvaluatedModel(str(name), of_model.get("revision") or None, of_model.get("adapter_weights") or None)
