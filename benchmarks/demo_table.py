"""Gathers runs of `sts-fast demo` into results/demo.json and prints them as one table.

sts-fast demo --seeds 3 --output light
sts-fast demo --seeds 3 --heavy --output heavy
python -m benchmarks.demo_table light heavy
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "demo.json"
KEPT = ("versions", "organism", "training", "n_questions", "primary", "score", "findings", "summary")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of sts-fast demo; none: prints what is gathered")
    runs = parser.parse_args().runs
    if runs:
        gathered = {run.name: compact(json.loads((run / "demo.json").read_text(encoding="utf-8"))) for run in runs}
        RESULTS.write_text(json.dumps(gathered, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(table(json.loads(RESULTS.read_text(encoding="utf-8"))))


def compact(demo: dict[str, Any]) -> dict[str, Any]:
    """A demo.json without the domains one by one, numbers to four digits."""
    trials = [
        {key: trial[key] for key in ("train", "seed", "own_change", "r", "r_ci_domains")} for trial in demo["trials"]
    ]
    return dict(rounded({**{key: demo[key] for key in KEPT}, "trials": trials}))


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


def table(gathered: dict[str, Any]) -> str:
    """Markdown: mean r [lowest, highest] and above zero in how many, of every predictor and of every outcome."""
    first = next(iter(gathered.values()))
    primary, score = first["primary"], first["score"]
    by_predictor = [
        (predictor, [cell(demo["summary"][primary][predictor]) for demo in gathered.values()])
        for predictor in first["summary"][primary]
    ]
    by_outcome = [
        (outcome.replace("|", "\\|"), [cell(demo["summary"][outcome][score]) for demo in gathered.values()])
        for outcome in first["summary"]
    ]
    return markdown("predictor", gathered, by_predictor) + "\n" + markdown(f"{score} with", gathered, by_outcome)


def cell(spread: dict[str, Any]) -> str:
    return (
        f"{spread['mean_r']:.2f} [{spread['min_r']:.2f}, {spread['max_r']:.2f}] {spread['n_above_zero']}/{spread['n']}"
    )


def markdown(corner: str, columns: Iterable[str], rows: Iterable[tuple[str, list[str]]]) -> str:
    lines = [[corner, *columns], ["---"] * (1 + len(list(columns))), *([name, *cells] for name, cells in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main()
