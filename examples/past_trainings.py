"""24 past trainings of the embedded model, with evaluations as lm-evaluation-harness writes them: half a minute.

    python examples/past_trainings.py FOLDER

The folder gets a model, its SAE, questions of 15 abilities, 24 training sets and a new one, and the accuracies
before and after each training; those of the new one are to be looked at last.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from sts_fast.data.examples import Example
from sts_fast.demo import organism
from sts_fast.demo.organism import Abilities

DOMAINS = tuple(organism.DOMAINS)[::5]
PAST = tuple(organism.DOMAINS)[1::3]
NEW = "T4.swap.c"


def write_examples(path: Path, examples: Sequence[Example]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"question": example.question, "answer": example.answer} for example in examples]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_results(folder: Path, model: str, abilities: Abilities) -> None:
    """Accuracies of each domain, each a task of its own."""
    folder.mkdir(parents=True)
    n = abilities.is_exact.shape[1]
    results = {
        name: {"acc,none": float(p), "acc_stderr,none": float((p * (1 - p) / (n - 1)) ** 0.5)}
        for name, p in zip(abilities.domains, abilities.accuracy, strict=True)
    }
    document = {
        "results": results,
        "n-shot": dict.fromkeys(results, 0),
        "config": {"model": "hf", "model_args": f"pretrained={model}"},
        "n-samples": {name: {"original": n, "effective": n} for name in results},
    }
    (folder / "results_2026-01-01T00-00-00.json").write_text(json.dumps(document), encoding="utf-8")


def main(folder: Path) -> None:
    shutil.copytree(organism.model_folder(), folder / "model")
    shutil.copytree(organism.sae_folder(), folder / "sae")
    domains = {name: organism.examples(name, 52, seed=1) for name in DOMAINS}
    asked = {example.question for examples in domains.values() for example in examples}
    trains = {
        name: [example for example in organism.examples(name, 216, seed=3) if example.question not in asked]
        for name in (*PAST, NEW)
    }
    for name, examples in domains.items():
        write_examples(folder / "domains" / f"{name}.jsonl", examples)
    for name in PAST:
        write_examples(folder / "train" / f"{name}.jsonl", trains[name])
    write_examples(folder / "new.jsonl", trains[NEW])

    model, tokenizer = organism.load_model()
    write_results(folder / "evals" / "base", "model", organism.measure(model, tokenizer, DOMAINS, n=128, seed=2))
    for name in (*PAST, NEW):
        tuned = organism.fine_tune(model, tokenizer, trains[name], steps=12, lr=2e-4, seed=0)
        folder_name = "new" if name == NEW else name
        write_results(folder / "evals" / folder_name, name, organism.measure(tuned, tokenizer, DOMAINS, n=128, seed=2))
        print(f"trained on {name}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
