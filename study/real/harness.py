"""The study's outcomes as lm-evaluation-harness writes them, so that the product reads them as a user's."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from study.real.sources import Row, asked

# Domain -> its questions and the loss of each answer, in nats per token.
Answers = dict[str, tuple[list[Row], NDArray[np.float64]]]

TIME = "2026-01-01T00-00-00"  # in the names of both kinds of file, which belong together by it
METRIC = "loss"


def write(folder: Path, answers: Answers, *, model: str) -> None:
    """Writes the results and the samples of every domain; model: whose they are."""
    folder.mkdir(parents=True, exist_ok=True)
    results, n_samples = {}, {}
    for domain, (rows, losses) in answers.items():
        stderr = float(losses.std(ddof=1) / len(losses) ** 0.5)
        results[domain] = {f"{METRIC},none": float(losses.mean()), f"{METRIC}_stderr,none": stderr}
        n_samples[domain] = {"original": len(losses), "effective": len(losses)}
        samples = [
            {
                "doc_id": i,
                "doc_hash": hashlib.sha256(f"{asked(row)}\n{row['answer']}".encode()).hexdigest(),
                "filter": "none",
                METRIC: float(loss),
            }
            for i, (row, loss) in enumerate(zip(rows, losses, strict=True))
        ]
        lines = "".join(json.dumps(sample) + "\n" for sample in samples)
        (folder / f"samples_{domain}_{TIME}.jsonl").write_text(lines, encoding="utf-8")
    document = {
        "results": results,
        "higher_is_better": {domain: {METRIC: False} for domain in results},
        "n-samples": n_samples,
        "n-shot": dict.fromkeys(results, 0),
        "config": {"model": "hf", "model_args": f"pretrained={model}"},
    }
    (folder / f"results_{TIME}.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
