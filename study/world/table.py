"""The results as tables: for each base model and way of training, the spread over trainings of every predictor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results" / "study.json"
REGIMES = ("light", "heavy", "lora")
COLUMNS = {
    "r, change of P": ("zero-shot dP", "signed"),
    "r, size of it": ("zero-shot dP", "size"),
    "AUC, distinct": ("zero-shot dP", "auc_distinct"),
    "r, fall of loss": ("zero-shot dloss", "signed"),
    "r, its size": ("zero-shot dloss", "size"),
    "r, accuracy": ("zero-shot daccuracy", "signed"),
    "few-shot r, P": ("few-shot dP", "signed"),
    "few-shot r, size": ("few-shot dP", "size"),
    "few-shot r, loss": ("few-shot dloss", "signed"),
}


def table(results: dict[str, Any]) -> str:
    """Markdown: mean [lowest, highest] over trainings."""
    sections = []
    for regime in REGIMES:
        for base, of_base in results.items():
            if regime not in of_base:
                continue
            found = of_base[regime]
            lines = [["predictor", *COLUMNS], ["---"] * (1 + len(COLUMNS))]
            for name in found["zero-shot dP"]:
                lines.append([name, *(cell(found[outcome][name][kind]) for outcome, kind in COLUMNS.values())])
            title = f"{base}, {regime}, {len(found['trainings'])} trainings"
            sections.append(f"## {title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines))
    return "\n".join(sections)


def cell(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "none"
    return f"{np.mean(known):.2f} [{min(known):.2f}, {max(known):.2f}]"
