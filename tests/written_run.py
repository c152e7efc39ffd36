"""A run's folder, made up and written by hand, and its report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from html_tree import Node, read_page

from sts_fast.forecast.run import (
    FEATURES_FILE,
    SCHEMA_VERSION,
    SCORES_FILE,
    SHIFT_FILE,
    VALIDATION_FILE,
    save_beside,
)
from sts_fast.outcomes.outcomes import Outcome
from sts_fast.outcomes.validate import validate
from sts_fast.profile.means import FeatureMeans
from sts_fast.report import build_report

D_SAE = 400
TOP_N = 30
HOSTILE = [
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'; drop table domains; -- & &amp; &lt;",
    "</title></style></svg><svg onload=alert(1)>",
    "{{ 7 * 7 }}{% for x in y %}",
    "a" * 2000,
    "long words " * 60,
    "数学の問題と物理の問題と化学の問題と生物の問題と歴史の問題",
    "حساب التفاضل والتكامل",
    "\u202eright to left override",
    "naïve café 🧮 ½ <b>",
    "]]> --> <!-- <![CDATA[",
    "javascript:alert(1)",
]


def make_scores(n: int = 6, seed: int = 0) -> dict[str, Any]:
    """A scores.json with every estimator and control."""
    rng = np.random.default_rng(seed)
    domains = []
    for i in range(n):
        act, icl = float(9 * 0.93**i * rng.uniform(0.99, 1.01)), float(rng.uniform(0.2, 2))
        domains.append(
            {
                "name": f"domain {i}",
                "scores": {
                    "act": {"value": act, "ci": [act * 0.92, act * 1.06]},
                    "icl": {"value": icl, "ci": [icl * 0.9, icl * 1.1]},
                    "act_sq": {"value": icl / 100, "ci": [icl / 110, icl / 90]},
                },
                "n_prompts": 40 + i,
                "n_tokens": 4000 + i,
                "n_pairs": 3900 + i,
                "n_skipped": 5,
                "n_too_long": 3,
                "n_unanswered": 2,
                "n_special": 7,
                "n_straddling": 0,
                "demonstrations": [["1", "2"], ["61", "62"]],
                "n_sinks": 1,
                "controls": {
                    "random": {name: float(rng.uniform(1, 9)) / 1e4 for name in ("act", "icl", "act_sq")},
                    "low_shift": {"act": float(rng.uniform(0, 1)), "icl": float(rng.uniform(0, 1))},
                    "most_active": {"act": act + 1},
                    "cosine_of_means": {"cosine": float(rng.uniform(0.5, 1))},
                    "base_loss": {"nll": float(rng.uniform(1, 3))},
                    "base_accuracy": {"accuracy": 0.25},
                },
                "change": None,
                "change_interval": None,
            }
        )
    importance = make_importance(seed)
    top = np.argsort(-importance, kind="stable")[:TOP_N]
    return {
        "schema_version": SCHEMA_VERSION,
        "model": {
            "name": "models/deep/a-model", "layer": 3, "module": "layers.3", "side": "output",
            "d_in": 64, "dtype": "float32", "context_length": 512,
            "revision": None, "weights_sha256": "ab" * 32,
        },
        "sae": {
            "source": "saes/of/the-sae", "architecture": "topk", "d_in": 64, "d_sae": D_SAE, "k": 8,
            "hook_name": "model.layers.3", "mean_l0": 8.0,
            "fit": {
                "n_tokens": 1024, "variance_explained": 0.83, "mean_l0": 8.0, "expected_l0": None, "dead_share": 0.5,
                "fits": True, "warning": None, "names": None,
            },
        },
        "train": {
            "name": "train", "n_prompts": 200, "n_tokens": 20000, "n_pairs": 19999, "n_skipped": 9, "n_too_long": 9,
            "n_unanswered": 0, "n_special": 1, "n_straddling": 0, "n_sinks": 2,
            "demonstrations": [["1", "2"], ["101", "102"]],
        },
        "settings": {
            "dims": "icl", "estimators": ["act", "icl", "act_sq"], "controls": "all", "top_n": TOP_N, "tokens": "query",
            "shots": 2, "domain_shots": 5, "demo_draws": 2, "limit": 256, "n_bootstrap": 1000, "confidence": 0.95,
            "tuned": None,
        },
        "shift": {
            "share_of_top_n": float(importance[top].sum() / importance.sum()),
            "n_features_shifted": D_SAE,
            "concentration": [{"n": D_SAE, "share": 1.0}],
            "stability": {"n_replicates": 32, "mean_overlap": 0.9, "overlap_ci": [0.85, 0.95]},
        },
        "length": {"act": {"constant_share": 0.1, "r_inverse_length": 0.2}},
        "settled": {
            "shifted_features": {"kept": 0.9, "more_prompts": 0},
            "ranking": {"act": {"pairs_apart": 0.5, "more_prompts": None}},
        },
        "domains": domains,
        "shifted_features": [
            {
                "index": int(j),
                "mean_squared_shift": float(importance[j]),
                "mean_activation": float(rng.uniform(0, 2)),
                "share": float(importance[j] / importance.sum()),
                "promoted_tokens": None,
                "neuronpedia": None,
                "label": None,
            }
            for j in top
        ],
        "signed": None,
        "rollouts": None,
        "calibration": None,
        "warnings": [],
        "provenance": {
            "created_at": "2026-01-02T03:04:05+00:00",
            "command": "sts-fast score --train set.jsonl",
            "seed": 7,
            "versions": {"sts_fast": "0.0.test", "python": "3.11.0"},
            "instruction_set": "avx2",
            "prompts_sha256": "ef" * 32,
            "forward_passes": {
                **{"strategy": "plain", "why": "", "batch_tokens": 8192, "n_passes": 3, "n_tokens": 900},
                **{"seconds": 1.5, "tokens_per_second": 600.0},
            },
            "inputs": [
                {"role": "train", "path": "data/maths/set.jsonl", "sha256": "ab" * 32},
                {"role": "domains", "path": "evals/law.jsonl", "sha256": "cd" * 32},
            ],
            "rows": [
                {
                    **{"sets": ["law"], "columns": {"question": ["question"]}, "unread": ["passage"], "n_rows": 40},
                    **{"left_out": {"no question in 'question'": 2}, "n_bad": 0, "notes": []},
                },
            ],
        },
    }  # fmt: skip


def make_signed(scores: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """Signed scores of every domain of a run, by adapter and ntk, and the block that they rest on."""
    rng = np.random.default_rng([seed, 2])
    domains: dict[str, Any] = {}
    for domain in scores["domains"]:
        found: dict[str, Any] = {
            "n_prompts": 40, "base_loss": 0.7, "p_answer": 0.4, "gradient_cosine": 0.2
        }  # fmt: skip
        for number in ("adapter", "adapter_loss", "ntk", "ntk_loss"):
            value = float(rng.normal(0, 0.3))
            domain["scores"][number] = {"value": value, "ci": [value - 0.15, value + 0.1]}
        parts = rng.normal(0, 0.1, 8)
        found["top_features"] = [
            {"index": int(j), "contribution": float(parts[j])} for j in np.argsort(-np.abs(parts), kind="stable")
        ]
        domains[domain["name"]] = found | {"share_of_top_features": float(rng.uniform(0.5, 0.9))}
    shares = np.sort(rng.uniform(0.01, 0.1, 8))[::-1]
    features = [
        {
            "index": j, "share": float(shares[j]), "promoted_tokens": [" up"], "neuronpedia": f"https://n.org/{j}",
            "label": f"signed label {j}",
        }
        for j in range(8)
    ]  # fmt: skip
    return {
        "features": "sae", "train_loss": 0.5, "loss_left": {"adapter": 0.04}, "trial": None,
        "domains": domains,
        "top_features": features,
    }  # fmt: skip


def make_ablation(scores: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """An ablation.json of a run, with the training set and every domain."""
    rng = np.random.default_rng([seed, 3])

    def change(n: int) -> dict[str, Any]:
        draws = rng.normal(-0.1, 0.1, n)
        return {"value": float(draws.mean()), "ci": [float(draws.mean() - 0.1), float(draws.mean() + 0.05)],
                "draws": draws.tolist()}  # fmt: skip

    def condition(n: int) -> dict[str, Any]:
        found: dict[str, Any] = {"removed": 0.1} | {name: change(n) for name in ("loss", "p_answer", "accuracy")}
        if n > 1:
            for name in ("loss", "p_answer", "accuracy"):
                less = float(rng.normal(-0.1, 0.1))
                found[name]["top_less_this"] = {"value": less, "ci": [less - 0.08, less + 0.08]}
        return found

    top = sorted(feature["index"] for feature in scores["shifted_features"])
    return {
        "schema_version": "1.0", "model": "m", "forecast_of": "m", "sae": "s", "hook_name": "h", "top_n": len(top),
        "few_shot": False, "n_draws": 3, "features": {"top": [top], "random": [[1]] * 3, "low_shift": [[2]] * 3,
                                            "like_activity": [[3]] * 3},
        "sets": [
            {"name": name, "kind": kind, "n_prompts": 40, "before": {"loss": 0.7, "p_answer": 0.5, "accuracy": 0.5},
             "conditions": {"top": condition(1)} | {
                 name: condition(3) for name in ("random", "like_activity", "low_shift")}}
            for kind, name in [("train", "train"), *(("domain", domain["name"]) for domain in scores["domains"])]
        ],
        "provenance": {"created_at": "2026-01-02T03:04:05+00:00", "command": None, "seed": 0, "version": "0.0.test"},
    }  # fmt: skip


def make_importance(seed: int = 0) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.random.default_rng([seed, 1]).pareto(1.2, D_SAE)


def write_scores(folder: Path, scores: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SCORES_FILE).write_text(json.dumps(scores), encoding="utf-8")
    return folder


def write_past(folder: Path, n: int = 10) -> Path:
    """Validated runs of so many training sets, to learn a calibration from."""
    for number in range(n):
        scores = make_scores(6, seed=number)
        scores["provenance"]["inputs"][0]["sha256"] = f"{number:064x}"
        run = write_scores(folder / f"run-{number}", scores)
        changes = [
            {"name": of["name"], "outcome": {"change": 0.05 * of["scores"]["act"]["value"], "metric": "acc"}}
            for of in scores["domains"]
        ]
        save_beside(run, VALIDATION_FILE, {"domains": changes})
    return folder


def write_shift(folder: Path, scores: dict[str, Any], *, seed: int = 0) -> None:
    top = np.asarray([feature["index"] for feature in scores["shifted_features"]])
    make_means(make_importance(seed)).save(folder / SHIFT_FILE, {"shifted_features": top})


def make_means(importance: Any) -> FeatureMeans:
    """Of a set whose features are known by their importance alone."""
    nothing = np.zeros(len(importance))
    return FeatureMeans(
        "made up", "0", 1000, 1000, nothing, nothing.astype(np.int64), nothing, importance, importance,
        nothing[:, None],
    )  # fmt: skip


def write_firings(folder: Path, scores: dict[str, Any], text: str = "") -> list[dict[str, Any]]:
    rows = [
        {
            "feature": feature["index"], "rank": rank, "value": 9.0 - rank, "stage": "score", "domain": "domain 1",
            "id": f"q{rank}", "before": f"before{text}\n", "token": f" tok{text}", "after": f"\tafter{text}",
        }
        for feature in scores["shifted_features"][:25]
        for rank in (3, 0, 2, 1, 4)
    ]  # fmt: skip
    carriers = (scores["signed"] or {"top_features": []})["top_features"]
    signed = [row | {"stage": "signed", "feature": feature["index"]} for feature in carriers[:3] for row in rows[:5]]
    rows += [row | {"token": f" carries{text}"} for row in signed]
    pq.write_table(pa.Table.from_pylist(rows), folder / FEATURES_FILE)
    return rows


def write_validation(folder: Path, scores: dict[str, Any]) -> dict[str, Any]:
    rng = np.random.default_rng(5)
    changes = {d["name"]: Outcome(float(rng.normal(0, 0.05)), 0.4, 0.45, 0.01, 700) for d in scores["domains"]}
    document = validate(scores, changes).to_dict()
    save_beside(folder, VALIDATION_FILE, document)
    return document


def write_full_run(folder: Path, scores: dict[str, Any] | None = None) -> dict[str, Any]:
    """A run with every optional file and every optional value."""
    scores = scores or make_scores()
    for i, feature in enumerate(scores["shifted_features"]):
        feature["promoted_tokens"] = [" the", "\n", "law"]
        feature["neuronpedia"] = f"https://neuronpedia.org/a/b/{feature['index']}"
        feature["label"] = f"label {i}" if i % 2 else None
    scores["warnings"] = ["a warning of the run"]
    scores["signed"] = make_signed(scores)
    write_scores(folder, scores)
    write_shift(folder, scores)
    write_firings(folder, scores)
    write_validation(folder, scores)
    save_beside(folder, "ablation.json", make_ablation(scores))
    return scores


class Report(NamedTuple):
    """The scores of a run, its report as a tree, and the report's file."""

    scores: dict[str, Any]
    page: Node
    path: Path


def page_of(folder: Path, scores: dict[str, Any]) -> Node:
    """The report of a run that has scores.json alone."""
    return read_page(build_report(write_scores(folder, scores)))
