"""The demo's page: its forecasts beside the outcomes, with links to the reports of its training sets."""

from __future__ import annotations

import json
from pathlib import Path

from markupsafe import Markup

from sts_fast import files
from sts_fast.errors import InputError
from sts_fast.files import Document
from sts_fast.forecast.run import REPORT_FILE, VALIDATION_FILE
from sts_fast.report import figures
from sts_fast.report.numbers import bracketed, correlation
from sts_fast.report.outcome import measured, scatter
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
        scatters=_scatters(folder, demo),
        spreads=_spreads(demo),
        trials_figure=_trials(demo),
        predictors=list(demo["summary"][demo["primary"]]),
    )
    with files.atomic_path(folder / REPORT_FILE) as path:
        path.write_text(page, encoding="utf-8", newline="\n")
    return folder / REPORT_FILE


def _scatters(folder: Path, demo: Document) -> list[tuple[str, str, Markup]]:
    """(training set, its r, forecast against measured change) of the runs that were saved beside the demo."""
    found = []
    for i, trial in enumerate({trial["train"]: trial for trial in reversed(demo["trials"])}.values()):
        path = folder / trial["train"] / VALIDATION_FILE
        validation = files.read_json(path) if path.is_file() else {}
        title = f"Trained on {trial['train']}: measured change against {demo['score']}"
        figure = scatter(f"outcome-{i}", validation.get("estimator", ""), measured(validation), small=title)
        if figure is not None:
            r = trial["r"][demo["primary"]][demo["score"]]
            found.append((trial["train"], f"r = {correlation(r)}", figure))
    return found[::-1]


def _spreads(demo: Document) -> Markup:
    """Mean r of each predictor with the primary outcome, and the lowest and highest over the trainings."""
    summary = {name: spread for name, spread in demo["summary"][demo["primary"]].items() if spread["n"]}
    rows = [
        figures.Dot(
            name,
            spread["mean_r"],
            (spread["min_r"], spread["max_r"]),
            f"{correlation(spread['mean_r'])} [{correlation(spread['min_r'])}, {correlation(spread['max_r'])}]",
            kind="" if name == demo["score"] else "other",
        )
        for name, spread in summary.items()
    ]
    return figures.dots(
        "spreads",
        rows,
        SCALE,
        axis=("", "", "mean r over the trainings →"),
        title=f"Correlation of each number with {demo['primary']}, over all trainings",
        description="; ".join(f"{row.name}: {row.text}" for row in rows) + ". In brackets the lowest and the highest.",
    )


def _trials(demo: Document) -> Markup:
    """r of the score in each training, with its interval over domains."""
    rows = []
    for trial in demo["trials"]:
        r, ci = trial["r"][demo["primary"]][demo["score"]], trial["r_ci_domains"]
        if r is None:
            continue
        seed = f", seed {trial['seed']}" if len({other["seed"] for other in demo["trials"]}) > 1 else ""
        interval = tuple(ci) if ci else None
        rows.append(figures.Dot(f"{trial['train']}{seed}", r, interval, f"{correlation(r)}{bracketed(interval)}"))
    return figures.dots(
        "trials",
        rows,
        SCALE,
        axis=("", "", f"r of {demo['score']} with {demo['primary']} →"),
        title=f"Correlation of {demo['score']} with {demo['primary']} in each training",
        description="; ".join(f"{row.name}: {row.text}" for row in rows) + ". In brackets 95% over other domains.",
    )
