"""Results of lm-evaluation-harness, with its answers per question where they were logged."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from sts_fast.errors import InputError, listed
from sts_fast.files import Document
from sts_fast.outcomes.evaluation import METRICS, Evaluation, Task, finite

# The time in the name of a results file, which its samples files repeat.
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(\.\d+)?")
MEAN_TOLERANCE = 1e-6


def recognises(document: Any) -> bool:
    return isinstance(document, dict) and isinstance(document.get("results"), dict)


def read(path: Path, document: Document) -> Evaluation:
    """Results of versions 0.2 ('acc'), 0.4.0 to 0.4.5 ('acc,none', alias ' - law') and later (alias 'law')."""
    entries = {name: entry for name, entry in document["results"].items() if isinstance(entry, dict)}
    counts: Any = document.get("n-samples")
    counts = counts if isinstance(counts, dict) else {}
    evaluation = Evaluation()
    incomplete: list[str] = []
    for name, alias in _aliases(entries).items():
        entry, tasks = entries[name], {}
        samples = list(_read_samples(path, name))
        count = counts.get(name)
        n = finite(count.get("effective")) if isinstance(count, dict) else finite(entry.get("sample_len"))
        for key, value in entry.items():
            metric, _, extraction = key.partition(",")
            if key in ("alias", "name", "sample_len", "sample_count") or metric.endswith("_stderr"):
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            stderr = finite(entry.get(f"{metric}_stderr,{extraction}" if extraction else f"{metric}_stderr"))
            task = Task(float(value), f"{metric},{extraction or 'none'}", stderr, None if n is None else int(n))
            tasks[task.metric] = _with_samples(task, samples, metric, extraction)
            if samples and metric in METRICS and not tasks[task.metric].correct:
                incomplete.append(f"{name} ({len(samples)} of {task.n or 'unknown'})")
        if tasks:
            evaluation.metrics[alias] = tasks
    if not evaluation.metrics:
        raise InputError(f"{path} contains no metric of any task: give a results file of lm-evaluation-harness")
    if incomplete:
        evaluation.warnings.append(
            f"{path}: the samples are not those that the results were computed from, and are ignored: "
            f"{listed(dict.fromkeys(incomplete))}"
        )
    return evaluation


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
                    sample = json.loads(line)
                    if not isinstance(sample, dict) or "doc_id" not in sample:
                        raise InputError(f"{path}, line {number}: not a sample of lm-evaluation-harness")
                    # The prompts are most of the file and are not needed.
                    yield {key: sample[key] for key in sample if key not in ("doc", "arguments", "resps")}
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not readable JSON lines: {error}") from error


def _with_samples(task: Task, samples: list[Document], metric: str, extraction: str) -> Task:
    """The task with its answers by question, if these are complete and average to its value."""
    samples = [sample for sample in samples if sample.get("filter", extraction or "none") == (extraction or "none")]
    correct = {}
    for sample in samples:
        value = sample.get(metric)
        if isinstance(value, (bool, int, float)) and math.isfinite(value):
            correct[str(sample["doc_id"])] = float(value)
    whole = len(correct) == len(samples) > 0 and task.n in (None, len(correct))
    if not whole or abs(sum(correct.values()) / len(correct) - task.value) > MEAN_TOLERANCE:
        return task
    responses = [sample.get("filtered_resps") for sample in samples]
    invalid = [response in (["[invalid]"], "[invalid]") for response in responses]
    return replace(
        task,
        n=len(correct),
        correct=correct,
        key={str(sample["doc_id"]): str(sample.get("doc_hash", "")) for sample in samples},
        unparsed=sum(invalid) / len(invalid) if metric == "exact_match" else None,
    )


def time_of(path: Path) -> str:
    match = TIME.search(path.name)
    return match[0] if match else ""
