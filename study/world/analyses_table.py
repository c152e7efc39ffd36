"""The paper's analyses as tables: mean [lowest, highest] over trainings, for each base model and way of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from study.world.analyses import TOP_NS
from study.world.table import cell

RESULTS = Path(__file__).parent / "results" / "analyses.json"


def write(base: str, found: dict[str, Any]) -> dict[str, Any]:
    """All results, with those of one more base model."""
    results: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    results[base] = found
    RESULTS.write_text(json.dumps(results, separators=(",", ":")) + "\n", encoding="utf-8")
    return results


def analyses_table(results: dict[str, Any]) -> str:
    columns = [(base, regime) for base, found in results.items() for regime in found["r_with_size_of_dP"]]
    names = list(dict.fromkeys(name for base, regime in columns for name in results[base]["r_with_size_of_dP"][regime]))
    sections = ["## r with the size of the zero-shot change of P", ""]
    sections += lines(["predictor", *(f"{base}, {regime}" for base, regime in columns)])
    for name in names:
        found = (results[base]["r_with_size_of_dP"][regime].get(name, []) for base, regime in columns)
        sections += lines([name, *map(cell, found)], head=False)
    columns = [(base, regime) for base, found in results.items() for regime in found["overlap_with_true"]]
    sections += ["", "## Share of the truly shifted features that are found", ""]
    sections += lines(["features", *(f"{base}, {regime}" for base, regime in columns)])
    for name in results[columns[0][0]]["overlap_with_true"][columns[0][1]]:
        found = (results[base]["overlap_with_true"][regime][name] for base, regime in columns)
        sections += lines([name, *map(cell, found)], head=False)
    sections += ["", "## Share of the shift that the n most shifted features hold, mean over training sets", ""]
    sections += lines(["shift", *(f"n = {n}" for n in TOP_NS)])
    for base, found in results.items():
        for name, shares in found["share_held_by_top_n"].items():
            sections += lines([f"{base}, {name}", *(f"{share:.2f}" for share in shares)], head=False)
    trained = {base: found["saes"] for base, found in results.items() if "saes" in found}
    if trained:
        sections += ["", "## The SAEs", ""]
        sections += lines(
            ["SAE", *(f"{base}, {what}" for base in trained for what in ("unexplained", "features a row"))]
        )
        for name in next(iter(trained.values())):
            cells = [f"{saes[name][what]:.3g}" for saes in trained.values() for what in ("fvu", "l0")]
            sections += lines([name, *cells], head=False)
    return "\n".join(sections) + "\n"


def lines(cells: list[str], *, head: bool = True) -> list[str]:
    row = f"| {' | '.join(cells)} |"
    return [row, "| " + " | ".join("---" for _ in cells) + " |"] if head else [row]
