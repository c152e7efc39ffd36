"""Forecasts before reinforcement learning beside what it really does, on base models of the embedded world.

python -m study.world rl package     # or base-3, base-4: one base model; what has been run already is kept
python -m study.world rl             # the tables of all that have been run
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sts_fast import files
from sts_fast.demo import organism
from sts_fast.ops.shift import top_indices
from study.world import grpo
from study.world.correlations import OUTCOMES, SHOTS, Z_95, auc, pearson, rounded
from study.world.rl_forecasts import DIMS, TOP_N, World, forecast, true_shift, world
from study.world.trials import DOMAINS, Remembering, abilities, change

RESULTS = Path(__file__).parent / "results" / "rl.json"
TRUE, OTHERS = "true, after the training", "ground-truth demonstrations of other domains"
ESTIMATORS = ("STS_act", "STS_icl")

Tell = Callable[[str], None]


def run(name: str, folder: Path, work: Path, tell: Tell) -> None:
    """Forecasts, then trains, and keeps each step: `work`/rl-NAME.json whole, RESULTS as correlations."""
    path = work / f"rl-{name}.json"
    raw = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"trials": []}
    figures = json.loads((folder / organism.FIGURES_FILE).read_text(encoding="utf-8"))

    def keep() -> None:
        with files.atomic_path(path) as temporary:
            temporary.write_text(json.dumps(raw, default=lambda array: array.tolist()), encoding="utf-8")

    with organism.one_thread():
        base = world(folder)
        raw |= {"act": base.act, "icl": base.icl}
        tell("features of every domain")
        if "forecast" not in raw:
            raw["forecast"] = forecast(base, tell)
            keep()
        asking = Remembering(base.tokenizer)
        before = abilities(base.model, asking)
        raw["before"] = {shots: {"P": found.p_correct, "loss": found.answer_nll} for shots, found in before.items()}
        done = {(row["regime"], row["train"], row["seed"]) for row in raw["trials"]}
        for regime, (seeds, lr) in grpo.REGIMES.items():
            for seed in seeds:
                for train in grpo.TRAINS:
                    if (regime, train, seed) not in done:
                        raw["trials"].append(trial(base, before, asking, regime, train, seed, lr))
                        keep()
                        tell(f"{regime}: {train}, seed {seed}")
                results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
                results[name] = {"organism": figures, **compact(json.loads(path.read_text(encoding="utf-8")))}
                RESULTS.write_text(json.dumps(results, separators=(",", ":")) + "\n", encoding="utf-8")


def trial(
    base: World, before: dict[str, organism.Abilities], asking: Any, regime: str, train: str, seed: int, lr: float
) -> dict[str, Any]:
    tuned, rewards = grpo.train(base.model, base.tokenizer, train, lr=lr, seed=seed)
    after = abilities(tuned, asking)
    shift = true_shift(base, tuned, train)
    top = top_indices(shift, TOP_N)
    return {
        "regime": regime,
        "train": train,
        "seed": seed,
        "rewards": rounded(rewards),
        "dims": top,
        "share_of_top_n": float(shift[top].sum() / shift.sum()),
        **{shots: change(old, after[shots]) for shots, old in before.items()},
    }


def compact(raw: dict[str, Any]) -> dict[str, Any]:
    """Per way of training, lists over the runs whose reward rose; the others are named.

    overlap:        by D_N, how many of its features are among the run's TOP_N truly shifted ones
    share_of_top_n: share of the true shift that these hold
    rewards:        [first five steps, last ten steps]
    'zero-shot dP' etc.: by predictor, `signed`, `size`, `auc_distinct`, see correlations.compact; scores of D_N have
        `size` only
    """
    found: dict[str, Any] = {}
    for regime in grpo.REGIMES:
        rows = [row for row in raw["trials"] if row["regime"] == regime]
        if not rows:
            continue
        counted = [row for row in rows if grpo.has_risen(row["rewards"])]
        of_regime: dict[str, Any] = {
            "trainings": [[row["train"], row["seed"]] for row in counted],
            "not_counted": [[row["train"], row["seed"]] for row in rows if row not in counted],
            "rewards": [rounded([np.mean(row["rewards"][:5]), np.mean(row["rewards"][-10:])]) for row in counted],
            "share_of_top_n": rounded(row["share_of_top_n"] for row in counted),
            "overlap": overlaps(raw, counted),
        }
        for shots in SHOTS:
            for outcome in OUTCOMES:
                of_regime[f"{shots} {outcome}"] = correlations(raw, counted, shots, outcome)
        found[regime] = of_regime
    return found


def overlaps(raw: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, list[float | None]]:
    demonstrated = [set(np.argsort(-np.asarray(shift), kind="stable")[:TOP_N].tolist()) for shift in raw["icl"]]
    found: dict[str, list[float]] = {name: [] for name in (*DIMS, OTHERS)}
    for row in rows:
        true = set(row["dims"])
        at = grpo.TRAINS.index(row["train"])
        for name in DIMS:
            found[name].append(np.mean([len(true & set(dims)) for dims in raw["forecast"]["dims"][name][at]]))
        others = [dims for domain, dims in zip(DOMAINS, demonstrated, strict=True) if domain != row["train"]]
        found[OTHERS].append(np.mean([len(true & dims) for dims in others]))
    return {name: rounded(values) for name, values in found.items()}


def correlations(raw: dict[str, Any], rows: list[dict[str, Any]], shots: str, outcome: str) -> dict[str, Any]:
    found: dict[str, dict[str, list[Any]]] = {}

    def add(name: str, kind: str, value: float | None) -> None:
        found.setdefault(name, {}).setdefault(kind, []).append(value)

    tables = {"STS_act": np.asarray(raw["act"]), "STS_icl": np.asarray(raw["icl"])}
    before = {"base P(answer)": raw["before"][shots]["P"], "base loss": raw["before"][shots]["loss"]}
    for row in rows:
        at = grpo.TRAINS.index(row["train"])
        others = np.asarray([name != row["train"] for name in DOMAINS])
        y = np.asarray(row[shots][outcome])[others]
        distinct = np.abs(np.asarray(row[shots].get(f"z_{outcome}", row[shots]["z_dP"]))[others]) > Z_95
        sets_of = {name: raw["forecast"]["dims"][name][at] for name in DIMS} | {TRUE: [row["dims"]]}
        for estimator, table in tables.items():
            for name, sets in sets_of.items():
                scores = [table[:, dims].sum(axis=1)[others] for dims in sets]
                r = [pearson(score, np.abs(y)) or 0.0 for score in scores]
                add(f"{estimator}, {name}", "size", float(np.mean(r)))
        direct = {name: values[at] for name, values in raw["forecast"]["direct"].items()} | before
        for name, values in direct.items():
            x = np.asarray(values)[others]
            add(name, "signed", pearson(x, y))
            add(name, "size", pearson(np.abs(x), np.abs(y)))
            add(name, "auc_distinct", auc(x[distinct], y[distinct]))
    return {name: {kind: rounded(values) for kind, values in kinds.items()} for name, kinds in found.items()}
