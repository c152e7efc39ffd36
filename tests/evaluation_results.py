"""Results of evaluations as lm-evaluation-harness writes them, written by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CASES = Path(__file__).parents[2] / "shared" / "cases"
TIME = "2025-05-01T10-00-00.000000"


def accuracies(**values: float) -> dict[str, dict[str, Any]]:
    """Entries of `results`: every task with this acc and a standard error of .03."""
    return {name: {"alias": name, "acc,none": value, "acc_stderr,none": 0.03} for name, value in values.items()}


def write_results(
    folder: Path,
    results: Mapping[str, Mapping[str, Any]],
    *,
    time: str = TIME,
    model: str | None = "org/base",
    shots: int = 5,
    task: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    **more: Any,
) -> Path:
    """A results file. task: the configuration of each task; config, more: keys that are added or replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "results": results,
        "configs": {name: {"task": name, "num_fewshot": shots, **(task or {})} for name in results},
        "versions": dict.fromkeys(results, 1.0),
        "n-shot": dict.fromkeys(results, shots),
        "config": {
            "model": "hf",
            "model_args": None if model is None else f"pretrained={model},dtype=bfloat16",
            "limit": None,
            "fewshot_seed": 1234,
            **(config or {}),
        },
        "chat_template": None,
        "chat_template_sha": None,
        "system_instruction": None,
        **more,
    }
    (folder / f"results_{time}.json").write_text(json.dumps(document), encoding="utf-8")
    return folder


def write_samples(folder: Path, task: str, right: list[float], *, prompts: str = "p", time: str = TIME) -> None:
    """The answers to a task's questions, with the hash of each prompt, for the metric acc."""
    rows = [
        {"doc_id": i, "doc_hash": f"q{i}", "prompt_hash": f"{prompts}{i}", "filter": "none", "acc": value}
        for i, value in enumerate(right)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"samples_{task}_{time}.jsonl").write_text(text, encoding="utf-8")
