"""A run as one self-contained HTML file: no script, no request to anywhere, light and dark."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any

from markupsafe import Markup

from sts_fast import files
from sts_fast.report import controls, features, numbers, outcome, ranking
from sts_fast.report.run import Run, read_run

REPORT_FILE = "report.html"
TEMPLATE = "report.html.j2"
STYLE = "report.css"


def build_report(folder: str | Path) -> Path:
    """Writes report.html into a run's folder, from the files that lie there, and returns its path.

    Reads scores.json and, where they are there, shift.safetensors (concentration curve), features.parquet (where the
    shifted features fire) and validation.json (forecast against outcome). The same files give the same bytes.

    Raises InputError where the folder holds no run, a file is damaged or of another version, or nothing can be written.
    """
    folder = Path(folder)
    page = _render(read_run(folder))
    with files.atomic_path(folder / REPORT_FILE) as path:
        path.write_text(page, encoding="utf-8", newline="\n")
    return folder / REPORT_FILE


def _render(run: Run) -> str:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        name: getattr(numbers, name)
        for name in (
            "significant", "interval", "correlation", "correlations", "chance", "percent", "count", "counted",
            "visible_token", "visible_context",
        )
    }  # fmt: skip
    source = resources.files("sts_fast.report")
    style = source.joinpath(STYLE).read_text(encoding="utf-8")
    template = environment.from_string(source.joinpath(TEMPLATE).read_text(encoding="utf-8"))
    return template.render(style=Markup(style), **_content(run))


def _content(run: Run) -> dict[str, Any]:
    """Everything that the template names."""
    scores = run.scores
    ranked = ranking.rankings(scores)
    model, train = short_name(scores["model"]["name"]), _train_name(scores)
    warnings = [*scores["warnings"], *run.warnings]
    if run.validation is not None:
        warnings += outcome.outcome_warnings(run.validation)
    return {
        "scores": scores,
        "model": model,
        "train": train,
        "sae": short_name(scores["sae"]["source"]),
        "summary": ranking.summary(scores, ranked, train, model),
        "warnings": warnings + ranking.cautions(scores, ranked),
        "rankings": ranked,
        "agreements": ranking.agreements(scores),
        "agreement_figure": ranking.agreement_figure(scores),
        "controls": controls.control_section(scores),
        "outcome": None if run.validation is None else outcome.outcome_section(run.validation),
        "concentration": features.concentration(run),
        "features": features.feature_section(run),
        "measure": "activity" if scores["settings"]["dims"] == "active" else "shift",
        "sets": [scores["train"] | {"name": "training set"}, *scores["domains"]],
    }


def short_name(name: str) -> str:
    """The last part of a path; a hub id as it is."""
    is_path = name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name
    return (re.split(r"[/\\]", name.rstrip("/\\"))[-1] or name) if is_path else name


def _train_name(scores: dict[str, Any]) -> str:
    """The training set's file with its folder, or the folder of its files; its name where several were compared."""
    if scores["train"]["name"] != "train":
        return str(scores["train"]["name"])
    paths = [PurePosixPath(entry["path"]) for entry in scores["provenance"]["inputs"] if entry["role"] == "train"]
    if not paths:
        return "the training set"
    if len(paths) == 1:
        return "/".join(part for part in paths[0].parts[-2:] if part != "/")
    return f"{paths[0].parent.name or 'a folder'} ({len(paths)} files)"
