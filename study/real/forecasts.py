"""Forecasts of the product, as a user would ask for them, with their time and memory; of one part of the split a time.

Each is one command line in a process of its own. `paper` reads the tokens that the chat template writes around a
question, as the product did by default when the study was planned; `paper without template` reads the question alone,
as it does now. `embedding` is none of the product's: a text-only number to hold the others against.

Forecasts of the judged part are made once, of those that `results/frozen.json` names.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sts_fast.forecast.estimators import SIGNED
from study.real import embedding, runs
from study.real.runs import Tell
from study.real.saes import LAYERS
from study.real.sets import DEMONSTRATIONS

RESULTS = runs.RESULTS / "forecasts"
FROZEN = runs.RESULTS / "frozen.json"
PARTS = ("design", "judged")
MIDDLE = LAYERS[len(LAYERS) // 2]
PAPER = ("--estimators", "act,icl,act_sq")
# In bfloat16, as the trainings' products, and of 64 rows of a training set, as many as 16 steps of a trial.
SHORT = ("--dims", "active", "--dtype", "bfloat16", "--limit", "64")

Numbers = dict[str, dict[str, dict[str, float]]]  # training set -> domain -> name of a number -> its value


@dataclass(frozen=True)
class Asked:
    """One forecast: its options beside model, sets and demonstrations, and the layers of its SAEs.

    options: None for one that the product does not make
    """

    name: str
    options: tuple[str, ...] | None
    layers: tuple[int, ...] = (MIDDLE,)


FORECASTS = (
    Asked("paper", (*PAPER, "--controls", "all", "--tokens", "template"), LAYERS),
    Asked("paper without template", PAPER, LAYERS),
    Asked("active", ("--estimators", "act,act_sq", "--dims", "active")),
    # Those with a sign read features without demonstrations, which they do not use; `reading` is what that costs.
    *(
        Asked(name, (*SHORT, "--estimators", ",".join(["act", *options[:1]]), *options[1:]))
        for name, options in {
            "reading": (),
            "ntk": ("ntk",),
            "step": ("step",),
            "adapter": ("adapter",),
            "trial": ("trial",),
            "trial, 8 steps and prompts": ("trial", "--trial-steps", "8", "--trial-prompts", "8"),
            "trial, 4 steps and prompts": ("trial", "--trial-steps", "4", "--trial-prompts", "4"),
        }.items()
    ),
    Asked("embedding", None),
)


def forecast(work: Path, names: list[str], part: str, tell: Tell) -> None:
    """Makes the forecasts that have no results yet, of training sets and domains of one part of the split alone.

    Raises SystemExit for the judged part where nothing is frozen yet; forecasts that are not are left out.
    """
    sets = runs.read_json(runs.RESULTS / "split.json")[part]
    if part == "judged" and not FROZEN.exists():
        raise SystemExit(f"the judged part is forecast once, when {FROZEN} says by what")
    known = [asked for asked in FORECASTS if part == "design" or asked.name in runs.read_json(FROZEN)["forecasts"]]
    for asked in known:
        path = RESULTS / part / f"{asked.name}.json"
        if path.exists() or (names and asked.name not in names):
            continue
        tell(f"forecast {asked.name} of the {part} part")
        process = multiprocessing.get_context("fork").Process(target=make_and_write, args=(work, asked, sets, path))
        process.start()
        process.join()
        if process.exitcode != 0:
            raise SystemExit(f"the forecast {asked.name!r} ended with exit code {process.exitcode}")


def make_and_write(work: Path, asked: Asked, part: dict[str, list[str]], path: Path) -> None:
    import torch

    torch.set_num_threads(1)
    start = time.process_time()
    if asked.options is None:
        by_layer = {"0": embedding.forecast(work, part["trains"], part["domains"])}
        record: dict[str, Any] = {"command": "all-MiniLM-L6-v2"}
    else:
        by_layer = run(work, asked, part, work / "forecasts" / path.parent.name / asked.name)
        record = {"command": " ".join(("sts-fast", *command(Path("WORK"), asked, part)))}
    record |= {
        "seconds": round(time.process_time() - start, 1),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    runs.write_json(path, record | by_layer)


def run(work: Path, asked: Asked, part: dict[str, list[str]], output: Path) -> dict[str, Numbers]:
    """By layer, the numbers of the product's command."""
    from sts_fast.cli import main

    sys.argv = ["sts-fast", *command(work, asked, part), "--output", str(output), "--overwrite"]
    main()
    made = [runs.read_json(scores) for scores in sorted(output.rglob("scores.json"))]
    signed_alone = asked.options is not None and asked.options[: len(SHORT)] == SHORT
    return {str(layer): numbers(made, layer, signed_alone=signed_alone) for layer in asked.layers}


def command(work: Path, asked: Asked, part: dict[str, list[str]]) -> list[str]:
    return [
        "compare",
        *("--model", str(work / "model")),
        *(word for layer in asked.layers for word in ("--sae", str(work / "sae" / str(layer)))),
        *(word for name in part["trains"] for word in ("--train", f"{name}={work}/train/{name}.jsonl")),
        *(word for name in part["domains"] for word in ("--domains", f"{name}={work}/domains/{name}.jsonl")),
        *("--domain-shots", str(DEMONSTRATIONS), "--threads", "1"),
        *(asked.options or ()),
    ]


def numbers(runs_of_saes: list[dict[str, Any]], layer: int, *, signed_alone: bool = False) -> Numbers:
    """Every score and control of the runs of one SAE, or those with a sign and the base loss alone."""
    found: Numbers = {}
    for run in runs_of_saes:
        if run["model"]["layer"] != layer:
            continue
        of_train = found.setdefault(run["train"]["name"], {})
        for domain in run["domains"]:
            values = {name: of["value"] for name, of in domain["scores"].items() if name in SIGNED or not signed_alone}
            for control, some in ({} if signed_alone else domain["controls"]).items():
                values |= {f"{control} {name}": value for name, value in some.items()}
            signed = (run["signed"] or {"domains": {}})["domains"].get(domain["name"], {})
            values |= {name: signed[name] for name in ("gradient_cosine", "base_loss") if signed.get(name) is not None}
            if (run["signed"] or {}).get("trial"):
                values["trial mean_fall"] = run["signed"]["trial"]["domains"][domain["name"]]["mean_fall"]
            of_train[domain["name"]] = {name: float(f"{value:.6g}") for name, value in values.items()}
    return found
