"""Results of lm-evaluation-harness, with its answers per question where they were logged."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from sts_fast.errors import InputError, listed
from sts_fast.files import Document
from sts_fast.outcomes.evaluation import (
    EvaluatedModel,
    Evaluation,
    Result,
    Task,
    count,
    finite,
    setting_text,
    whole_number,
)
from sts_fast.outcomes.metrics import is_accuracy

# The time in the name of a results file, which its samples files repeat.
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(\.\d+)?")
MEAN_TOLERANCE = 1e-6


# Arguments of a model that change how fast it runs, and those that say which model it is.
SPEED = {
    "batch_size", "max_batch_size", "device", "device_map", "device_map_option", "parallelize", "cache_dir",
    "swap_space", "tensor_parallel_size", "data_parallel_size", "gpu_memory_utilization", "max_num_seqs",
    "num_concurrent", "max_retries", "timeout", "base_url", "offload_folder", "max_memory_per_gpu", "max_cpu_memory",
    "trust_remote_code", "use_fast_tokenizer", "low_cpu_mem_usage",
}  # fmt: skip
NAMES_OF_MODEL = ("pretrained", "model", "path", "engine")
ADAPTERS = ("peft", "delta")
WHICH_MODEL = {*NAMES_OF_MODEL, *ADAPTERS, "revision", "subfolder", "tokenizer"}
# Settings of a whole run, and the name by which each is told.
OF_RUN = {"system_instruction": "system instruction", "fewshot_as_multiturn": "fewshot_as_multiturn"}
OF_CONFIG = ("limit", "gen_kwargs", "random_seed", "numpy_seed", "torch_seed", "fewshot_seed", "model_dtype")
# Parts of a task's configuration that do not say how it is asked, or that are read elsewhere.
OF_NO_MATTER = {"task", "task_alias", "group", "group_alias", "tag", "metadata", "num_fewshot", "should_decontaminate"}


def recognises(document: Any) -> bool:
    return isinstance(document, dict) and isinstance(document.get("results"), dict)


def read(path: Path, document: Document) -> Evaluation:
    """Results of versions 0.2 ('acc'), 0.4.0 to 0.4.5 ('acc,none', alias ' - law') and later (alias 'law')."""
    entries = {name: entry for name, entry in document["results"].items() if isinstance(entry, dict)}
    evaluation = Evaluation(time=time_of(path))
    model = _model_of(document)
    incomplete: list[str] = []
    undefined: list[str] = []
    for name, alias in _aliases(entries).items():
        entry, results = entries[name], {}
        samples = list(_read_samples(path, name))
        n = _n_questions(document, name, entry)
        better = _of_task(document, "higher_is_better", name)
        for key, value in entry.items():
            metric, _, extraction = key.partition(",")
            if key in ("alias", "name", "sample_len", "sample_count") or metric.endswith("_stderr"):
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            if not math.isfinite(value):
                undefined.append(f"{metric} of {name}")
                continue
            stderr = finite(entry.get(f"{metric}_stderr,{extraction}" if extraction else f"{metric}_stderr"))
            is_better = better.get(metric) if isinstance(better, dict) else None
            result = Result(
                float(value), f"{metric},{extraction or 'none'}", stderr, n,
                higher_is_better=is_better if isinstance(is_better, bool) else None,
            )  # fmt: skip
            results[result.metric] = _with_samples(result, samples, metric, extraction)
            if samples and is_accuracy(metric) and not results[result.metric].correct:
                incomplete.append(f"{name} ({len(samples)} of {n or 'unknown'})")
        if results:
            members = _of_task(document, "group_subtasks", name)
            evaluation.tasks[alias] = Task(
                results,
                name,
                _made(document, name, n),
                model,
                tuple(map(str, members)) if isinstance(members, list) else (),
            )
    if not evaluation.tasks:
        raise InputError(f"{path} contains no metric of any task: give a results file of lm-evaluation-harness")
    if undefined:
        evaluation.warnings.append(f"{path}: not a number, and left out: {listed(undefined)}")
    if incomplete:
        evaluation.warnings.append(
            f"{path}: the samples are not those that the results were computed from, and are ignored: "
            f"{listed(dict.fromkeys(incomplete))}"
        )
    return evaluation


def _of_task(document: Document, block: str, task: str) -> Any:
    """A block's entry for a task; None where the version does not write it."""
    entries = document.get(block)
    return entries.get(task) if isinstance(entries, dict) else None


def _n_questions(document: Document, task: str, entry: Document) -> int | None:
    of_task = _of_task(document, "n-samples", task)
    return count(of_task.get("effective") if isinstance(of_task, dict) else entry.get("sample_len"))


def _made(document: Document, task: str, n: int | None) -> dict[str, str]:
    """How a task was evaluated: setting -> value as text."""
    run, config, of_task = document, document.get("config"), _of_task(document, "configs", task)
    config = config if isinstance(config, dict) else {}
    of_task = of_task if isinstance(of_task, dict) else {}
    shots = _of_task(document, "n-shot", task)
    of_questions = {
        "number of demonstrations": of_task.get("num_fewshot") if shots is None else shots,
        "version of the task": _of_task(document, "versions", task),
        "number of questions": n,
        "hash of the questions and prompts": _of_task(document, "task_hashes", task),
    }
    made: dict[str, Any] = {"harness": "lm-evaluation-harness", "task": task}
    made |= {name: value for name, value in of_questions.items() if value is not None}
    if "chat_template" in run or "chat_template_sha" in run:
        made["chat template"] = run.get("chat_template_sha") or run.get("chat_template")
    made |= {name: run[key] for key, name in OF_RUN.items() if key in run}
    made |= {key: config[key] for key in OF_CONFIG if key in config}
    if "model" in config:
        made["model type"] = config["model"]
    arguments = _model_arguments(config.get("model_args"))
    made |= {key: value for key, value in arguments.items() if key not in SPEED | WHICH_MODEL}
    made |= {key: value for key, value in of_task.items() if key not in OF_NO_MATTER}
    return {name: setting_text(value) for name, value in made.items()}


def _model_of(document: Document) -> EvaluatedModel | None:
    config = document.get("config")
    arguments = _model_arguments(config.get("model_args")) if isinstance(config, dict) else {}
    name = next((arguments[key] for key in NAMES_OF_MODEL if arguments.get(key)), None)
    adapter = next((str(arguments[key]) for key in ADAPTERS if arguments.get(key)), None)
    name = name or document.get("model_name")
    revision = arguments.get("revision")
    return EvaluatedModel(str(name), str(revision) if revision else None, adapter) if name else None


def _model_arguments(arguments: Any) -> dict[str, Any]:
    """Arguments of the model, which are a dictionary or 'pretrained=org/name,dtype=bfloat16'."""
    if isinstance(arguments, str):
        pairs = [part.partition("=") for part in arguments.split(",")]
        return {name.strip(): value for name, equals, value in pairs if equals}
    return arguments if isinstance(arguments, dict) else {}


def _aliases(entries: Document) -> dict[str, str]:
    """Task -> its alias, or its own name where two tasks have the same alias."""
    shown = {name: str(entry.get("alias") or name).strip(" -") or name for name, entry in entries.items()}
    taken = list(shown.values())
    return {name: alias if taken.count(alias) == 1 else name for name, alias in shown.items()}


def _read_samples(results: Path, task: str) -> Iterator[Document]:
    path = results.with_name(f"samples_{task}_{time_of(results)}.jsonl")
    if not path.is_file():
        return
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    sample = json.loads(line, parse_int=whole_number)
                    if not isinstance(sample, dict) or "doc_id" not in sample:
                        raise InputError(f"{path}, line {number}: not a sample of lm-evaluation-harness")
                    # The prompts are most of the file, and their hash is enough.
                    kept = {key: sample[key] for key in sample if key not in ("doc", "arguments", "resps")}
                    yield {"prompt_hash": prompt_hash(sample.get("arguments")), **kept}
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not readable JSON lines: {error}") from error


def prompt_hash(arguments: Any) -> str | None:
    """SHA-256 of the first prompt, as newer versions write it; None where the arguments are in no known form."""
    for step in (("gen_args_0", "arg_0"), (0, 0), (0, "arg_0")):
        prompt = arguments
        for key in step:
            is_there = (
                key in prompt if isinstance(prompt, dict) else isinstance(prompt, list) and key in range(len(prompt))
            )
            prompt = prompt[key] if is_there else None
        if isinstance(prompt, str):
            return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()
    return None


def _with_samples(result: Result, samples: list[Document], metric: str, extraction: str) -> Result:
    """The result with its answers by question, if these are complete and average to its value."""
    samples = [sample for sample in samples if sample.get("filter", extraction or "none") == (extraction or "none")]
    correct = {}
    for sample in samples:
        value = sample.get(metric)
        if isinstance(value, (bool, int, float)) and math.isfinite(value):
            correct[str(sample["doc_id"])] = float(value)
    whole = len(correct) == len(samples) > 0 and result.n in (None, len(correct))
    if not whole or abs(sum(correct.values()) / len(correct) - result.value) > MEAN_TOLERANCE:
        return result
    responses = [sample.get("filtered_resps") for sample in samples]
    invalid = [response in (["[invalid]"], "[invalid]") for response in responses]
    return replace(
        result,
        n=len(correct),
        correct=correct,
        key={str(sample["doc_id"]): str(sample.get("doc_hash", "")) for sample in samples},
        prompt={str(sample["doc_id"]): str(sample["prompt_hash"]) for sample in samples if sample["prompt_hash"]},
        unparsed=sum(invalid) / len(invalid) if metric == "exact_match" else None,
    )


def time_of(path: Path) -> str:
    match = TIME.search(path.name)
    return match[0] if match else ""
