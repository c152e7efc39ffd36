"""The demo's page: its forecasts beside the outcomes, with links to the reports of its training sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from markupsafe import Markup

from sts_fast import files
from sts_fast.errors import InputError
from sts_fast.forecast.run import REPORT_FILE
from sts_fast.report import figures
from sts_fast.report.numbers import correlation
from sts_fast.report.page import render

DEMO_FILE = "demo.json"
TEMPLATE = "demo.html.j2"
SCALE = figures.Scale(-1, 1, (-1, -0.5, 0, 0.5, 1))


def build_demo_report(folder: str | Path) -> Path:
    """Writes report.html from the demo.json of that folder, and returns its path.

    Raises InputError where demo.json cannot be read or nothing can be written.
    """
    folder = Path(folder)
    try:
        demo = json.loads((folder / DEMO_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / DEMO_FILE} cannot be read ({error}): run sts-fast demo again") from error
    page = render(
        TEMPLATE,
        demo=demo,
        spreads=_spreads(demo),
        trials_figure=_trials(demo),
        predictors=list(demo["summary"][demo["primary"]]),
    )
    with files.atomic_path(folder / REPORT_FILE) as path:
        path.write_text(page, encoding="utf-8", newline="\n")
    return folder / REPORT_FILE


def _spreads(demo: dict[str, Any]) -> Markup:
    """Mean r of each predictor with the primary outcome, and the lowest and highest over the trainings."""
    summary = {name: spread for name, spread in demo["summary"][demo["primary"]].items() if spread["n"]}
    rows = [
        figures.Bar(
            name,
            spread["mean_r"],
            (spread["min_r"], spread["max_r"]),
            None,
            f"{correlation(spread['mean_r'])} [{correlation(spread['min_r'])}, {correlation(spread['max_r'])}]",
        )
        for name, spread in summary.items()
    ]
    return figures.dots(
        "spreads",
        rows,
        SCALE,
        title=f"Correlation of each number with {demo['primary']}, over all trainings",
        description="; ".join(f"{row.name}: {row.text}" for row in rows) + ". In brackets the lowest and the highest.",
    )


def _trials(demo: dict[str, Any]) -> Markup:
    """r of the score in each training, with its interval over domains."""
    rows = []
    for trial in demo["trials"]:
        r, ci = trial["r"][demo["primary"]][demo["score"]], trial["r_ci_domains"]
        if r is None:
            continue
        shown = f" [{correlation(ci[0])}, {correlation(ci[1])}]" if ci else ""
        seed = f", seed {trial['seed']}" if len({other["seed"] for other in demo["trials"]}) > 1 else ""
        rows.append(
            figures.Bar(f"{trial['train']}{seed}", r, tuple(ci) if ci else None, None, f"{correlation(r)}{shown}")
        )
    return figures.dots(
        "trials",
        rows,
        SCALE,
        n_filled=len(rows),
        title=f"Correlation of {demo['score']} with {demo['primary']} in each training",
        description="; ".join(f"{row.name}: {row.text}" for row in rows) + ". In brackets 95% over other domains.",
    )
