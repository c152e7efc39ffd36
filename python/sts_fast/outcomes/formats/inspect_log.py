"""Logs of inspect-ai: .json, or .eval, which is a zip archive of JSON."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sts_fast.errors import InputError, one_line
from sts_fast.files import Document
from sts_fast.outcomes.evaluation import (
    EvaluatedModel,
    Evaluation,
    Result,
    Task,
    count,
    finite,
    parse_json,
    setting_text,
)

SUFFIX = ".eval"
# The number of the compression that newer versions of inspect use; zipfile itself reads it from Python 3.14.
ZSTANDARD = 93
LOCAL_HEADER = 30
# Values that inspect's metrics give to letters: correct, incorrect, partial, no answer.
LETTERS = {"C": 1.0, "I": 0.0, "P": 0.5, "N": 0.0}
STDERRS = ("stderr", "bootstrap_stderr")
OF_CONFIG = ("limit", "sample_id", "sample_shuffle", "epochs", "epochs_reducer", "message_limit", "token_limit")
SPEED = {"max_connections", "max_retries", "timeout", "batch", "cache", "attempt_timeout", "adaptive_connections"}
MEAN_TOLERANCE = 1e-6
# Characters of a question that tell it apart; a log's summaries are cut.
SHOWN = 200


def recognises(document: Any) -> bool:
    return isinstance(document, dict) and isinstance(document.get("eval"), dict) and "task" in document["eval"]


def read(path: Path, document: Document) -> Evaluation:
    """The metrics of every scorer, as 'metric,scorer', and with the samples the values by question."""
    spec, outcome = document["eval"], document.get("results")
    evaluation = Evaluation(time=str(spec.get("created", "")))
    status = document.get("status")
    outcome = outcome if isinstance(outcome, dict) else {}
    scores = outcome.get("scores")
    if status != "success" or not isinstance(scores, list):
        evaluation.warnings.append(
            f"{path} is the log of an evaluation that did not end (status: {status}), and is left out"
        )
        return evaluation
    if document.get("invalidated"):
        evaluation.warnings.append(f"{path} is marked as invalidated, and is left out")
        return evaluation
    total, completed = (outcome.get(key) for key in ("total_samples", "completed_samples"))
    if total != completed and None not in (total, completed):
        evaluation.warnings.append(f"{path} has results of {completed} of {total} samples: the others failed")
    samples = document.get("samples")
    samples = samples if isinstance(samples, list) else []
    n = count(completed)
    results: dict[str, Result] = {}
    for score in scores:
        metrics = score.get("metrics") if isinstance(score, dict) else None
        if not isinstance(metrics, dict):
            continue
        scorer = str(score.get("name"))
        stderr = next((value for name in STDERRS if (value := _value(metrics.get(name))) is not None), None)
        for name, metric in metrics.items():
            value = _value(metric)
            if name in STDERRS or value is None:
                continue
            is_mean = name in ("accuracy", "mean")
            result = Result(value, f"{name},{scorer}", stderr if is_mean else None, n)
            results[result.metric] = _with_samples(result, samples, scorer) if is_mean else result
    if results:
        task = str(spec["task"])
        own = f"{task} ({_arguments(spec)})" if _arguments(spec) else task
        evaluation.tasks[task.rpartition("/")[2]] = Task(results, own, _made(document), _model_of(spec))
    else:
        evaluation.warnings.append(f"{path} contains no metric, and is left out")
    return evaluation


def read_archive(path: Path) -> Evaluation:
    """The log in a .eval file, with the summaries of its samples."""
    try:
        with zipfile.ZipFile(path) as archive:
            document = parse_json(path, _member(path, archive, "header.json"))
            if "summaries.json" in archive.namelist():
                document["samples"] = parse_json(path, _member(path, archive, "summaries.json"))
    except KeyError as error:
        raise InputError(
            f"{path} is a log of an evaluation that has not ended: wait for it, or run inspect eval-retry"
        ) from error
    except (OSError, zipfile.BadZipFile, NotImplementedError) as error:
        raise InputError(f"{path} is not a readable log of inspect ({one_line(error)}): give it as .json") from error
    if not recognises(document):
        raise InputError(f"{path} is not a log of inspect: give a .eval or .json that inspect wrote")
    return read(path, document)


def _member(path: Path, archive: zipfile.ZipFile, name: str) -> bytes:
    """A file of the archive. Raises KeyError where it is missing."""
    info = archive.getinfo(name)
    if info.compress_type != ZSTANDARD:
        return archive.read(name)
    import pyarrow as pa

    with path.open("rb") as file:
        file.seek(info.header_offset)
        header = file.read(LOCAL_HEADER)
        name_and_extra = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        file.seek(name_and_extra, 1)
        compressed = file.read(info.compress_size)
    with pa.CompressedInputStream(pa.BufferReader(compressed), "zstd") as stream:
        return bytes(stream.read())


def _value(metric: Any) -> float | None:
    return finite(metric.get("value")) if isinstance(metric, dict) else None


def _with_samples(result: Result, samples: list[Any], scorer: str) -> Result:
    """The result with its values by question, means over epochs, if these average to it."""
    values: dict[str, list[float]] = {}
    key: dict[str, str] = {}
    for sample in samples:
        scores = sample.get("scores") if isinstance(sample, dict) else None
        score = scores.get(scorer) if isinstance(scores, dict) else None
        value = _score_value(score.get("value")) if isinstance(score, dict) else None
        if value is None:
            return result
        question = str(sample.get("id"))
        values.setdefault(question, []).append(value)
        asked = sample.get("input")
        key[question] = f"{setting_text(sample.get('target'))} {asked[:SHOWN] if isinstance(asked, str) else ''}"
    correct = {question: float(np.mean(epochs)) for question, epochs in values.items()}
    if not correct or abs(float(np.mean(list(correct.values()))) - result.value) > MEAN_TOLERANCE:
        return result
    return replace(result, n=len(correct), correct=correct, key=key)


def _score_value(value: Any) -> float | None:
    if isinstance(value, bool):
        return float(value)
    return LETTERS.get(value) if isinstance(value, str) else finite(value)


def _arguments(spec: Document) -> str:
    passed = spec.get("task_args_passed", spec.get("task_args"))
    return ", ".join(f"{name}={value}" for name, value in passed.items()) if isinstance(passed, dict) else ""


def _made(document: Document) -> dict[str, str]:
    spec = document["eval"]
    blocks = {name: spec.get(name) for name in ("config", "model_generate_config", "task_args", "dataset")}
    config, generation, arguments, dataset = (block if isinstance(block, dict) else {} for block in blocks.values())
    made: dict[str, Any] = {"harness": "inspect-ai", "task": spec["task"]}
    if "task_version" in spec:
        made["version of the task"] = spec["task_version"]
    made |= {key: config.get(key) for key in OF_CONFIG}
    made |= {f"{key} of the generation": value for key, value in generation.items() if key not in SPEED}
    made |= {f"argument {key} of the task": value for key, value in arguments.items()}
    if "samples" in dataset:
        made["number of questions"] = dataset["samples"]
    plan = document.get("plan")
    steps = plan.get("steps") if isinstance(plan, dict) else None
    if isinstance(steps, list):
        made["solver"] = [[step.get("solver"), step.get("params")] for step in steps if isinstance(step, dict)]
    return {key: setting_text(value) for key, value in made.items()}


def _model_of(spec: Document) -> EvaluatedModel | None:
    """The model without the provider in front: hf/org/name is org/name, hf/local the folder in its arguments."""
    name = str(spec.get("model") or "")
    arguments = spec.get("model_args")
    arguments = arguments if isinstance(arguments, dict) else {}
    local = arguments.get("model_path")
    revision = arguments.get("revision")
    name = str(local) if local else name.partition("/")[2] or name
    return EvaluatedModel(name, str(revision) if revision else None) if name else None
