"""Forecasts of the product for the design part, as a user would ask for them, with their time and memory.

Each is one command line in a process of its own. `paper` reads the tokens that the chat template writes around a
question, as the product did by default when the study was planned; `paper without template` reads the question alone,
as it does now.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from study.real import runs
from study.real.runs import Tell
from study.real.saes import LAYERS
from study.real.sets import DEMONSTRATIONS

RESULTS = runs.RESULTS / "forecasts"
MIDDLE = LAYERS[len(LAYERS) // 2]
PAPER = ("--estimators", "act,icl,act_sq")

Numbers = dict[str, dict[str, dict[str, float]]]  # training set -> domain -> name of a number -> its value


@dataclass(frozen=True)
class Asked:
    """One forecast: its options beside model, sets and demonstrations, and the layers of its SAEs."""

    name: str
    options: tuple[str, ...]
    layers: tuple[int, ...] = (MIDDLE,)


FORECASTS = (
    Asked("paper", (*PAPER, "--controls", "all", "--tokens", "template"), LAYERS),
    Asked("paper without template", PAPER, LAYERS),
    Asked("active", ("--estimators", "act,act_sq", "--dims", "active")),
    Asked("ntk", ("--estimators", "ntk")),
    Asked("step", ("--estimators", "step")),
    Asked("adapter", ("--estimators", "adapter")),
)


def forecast(work: Path, names: list[str], tell: Tell) -> None:
    """Makes the forecasts that have no results yet, of training sets and domains of the design part alone."""
    part = runs.read_json(runs.RESULTS / "split.json")["design"]
    for asked in FORECASTS:
        path = RESULTS / f"{asked.name}.json"
        if path.exists() or (names and asked.name not in names):
            continue
        tell(f"forecast {asked.name}")
        process = multiprocessing.get_context("fork").Process(target=make_and_write, args=(work, asked, part, path))
        process.start()
        process.join()
        if process.exitcode != 0:
            raise SystemExit(f"the forecast {asked.name!r} ended with exit code {process.exitcode}")


def make_and_write(work: Path, asked: Asked, part: dict[str, list[str]], path: Path) -> None:
    import torch

    from sts_fast.cli import main

    torch.set_num_threads(1)
    output = work / "forecasts" / asked.name
    start = time.process_time()
    sys.argv = ["sts-fast", *command(work, asked, part), "--output", str(output)]
    main()
    record: dict[str, Any] = {
        "command": " ".join(("sts-fast", *command(Path("WORK"), asked, part))),
        "seconds": round(time.process_time() - start, 1),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    made = [runs.read_json(scores) for scores in sorted(output.rglob("scores.json"))]
    record |= {str(layer): numbers(made, layer) for layer in asked.layers}
    runs.write_json(path, record)


def command(work: Path, asked: Asked, part: dict[str, list[str]]) -> list[str]:
    return [
        "compare",
        *("--model", str(work / "model")),
        *(word for layer in asked.layers for word in ("--sae", str(work / "sae" / str(layer)))),
        *(word for name in part["trains"] for word in ("--train", f"{name}={work}/train/{name}.jsonl")),
        *(word for name in part["domains"] for word in ("--domains", f"{name}={work}/domains/{name}.jsonl")),
        *("--domain-shots", str(DEMONSTRATIONS), "--threads", "1"),
        *asked.options,
    ]


def numbers(runs_of_saes: list[dict[str, Any]], layer: int) -> Numbers:
    """Every score and control of the runs of one SAE."""
    found: Numbers = {}
    for run in runs_of_saes:
        if run["model"]["layer"] != layer:
            continue
        of_train = found.setdefault(run["train"]["name"], {})
        for domain in run["domains"]:
            values = {name: score["value"] for name, score in domain["scores"].items()}
            for control, some in domain["controls"].items():
                values |= {f"{control} {name}": value for name, value in some.items()}
            signed = (run["signed"] or {"domains": {}})["domains"].get(domain["name"], {})
            values |= {name: signed[name] for name in ("gradient_cosine", "base_loss") if name in signed}
            of_train[domain["name"]] = {name: float(f"{value:.6g}") for name, value in values.items()}
    return found
