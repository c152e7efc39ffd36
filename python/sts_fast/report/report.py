"""The report of one run."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from sts_fast import files
from sts_fast.forecast.blocks import Scores
from sts_fast.forecast.run import REPORT_FILE
from sts_fast.report import ablation, changes, controls, features, outcome, prompts, ranking, signed, training
from sts_fast.report.numbers import SAME, SIMILAR, plain
from sts_fast.report.page import render
from sts_fast.report.run import Material, read_material
from sts_fast.rollouts.counts_text import counts_in_words, overlaps_in_words

TEMPLATE = "report.html.j2"


def build_report(folder: str | Path) -> Path:
    """Writes report.html into a run's folder and returns its path.

    Reads scores.json and, if present, shift.safetensors (concentration curve), features.parquet (firings of the shifted
    features), prompts.parquet (what was asked), validation.json (forecast and outcome), ablation.json (zeroed features)
    and training.json (measurements of TransferMonitor). The same files give the same bytes.

    Raises InputError where the folder contains no run, a file is damaged or of another version, or nothing can be
    written.
    """
    folder = Path(folder)
    page = render(TEMPLATE, **_content(read_material(folder)))
    with files.atomic_path(folder / REPORT_FILE) as path:
        path.write_text(page, encoding="utf-8", newline="\n")
    return folder / REPORT_FILE


def conclusion(scores: Scores) -> str:
    """The sentence that the page of a run leads with, as plain text."""
    if estimators := signed.estimated(scores):
        lead = signed.summary(estimators)
    else:
        model, train = short_name(scores["model"]["name"]), _train_name(scores)
        lead = ranking.summary(scores, ranking.rankings(scores), train, model)
    return plain(lead)


def _content(run: Material) -> dict[str, object]:
    """Everything that the template names."""
    scores = run.scores
    block = scores.get("rollouts")
    ranked = ranking.rankings(scores)
    model, train = short_name(scores["model"]["name"]), _train_name(scores)
    warnings = [*ranking.cautions(scores, ranked), *scores["warnings"]]
    if scores["calibration"] is not None:
        warnings += scores["calibration"]["warnings"]
    if run.validation is not None:
        warnings += outcome.outcome_warnings(run.validation)
    return {
        "scores": scores,
        "model": model,
        "train": train,
        "sae": short_name(scores["sae"]["source"]),
        "summary": ranking.summary(scores, ranked, train, model),
        "warnings": list(dict.fromkeys([*warnings, *run.warnings])),
        "rankings": ranked,
        "changes": changes.change_section(scores),
        "agreements": ranking.agreements(scores),
        "agreement_figure": ranking.agreement_figure(scores),
        "controls": controls.control_section(scores),
        "outcome": None if run.validation is None else outcome.outcome_section(run.validation),
        "signed": signed.signed_section(run),
        "ablation": None if run.ablation is None else ablation.ablation_section(run.ablation),
        "training": None if run.training is None else training.training_section(run.training, scores),
        "concentration": features.concentration(run),
        "features": features.feature_section(run),
        "prompts": prompts.prompt_section(scores, run.prompts),
        "chosen": features.chosen(scores),
        "measure": features.MEASURES.get(scores["settings"]["dims"], "shift"),
        "rollouts": [] if block is None else [counts_in_words(block), overlaps_in_words(block)],
        "same": SAME,
        "similar": SIMILAR,
        "sets": [scores["train"] | {"name": "training set"}, *scores["domains"]],
    }


def short_name(name: str) -> str:
    """The last part of a path; a hub id as it is."""
    is_path = name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name
    return (re.split(r"[/\\]", name.rstrip("/\\"))[-1] or name) if is_path else name


def _train_name(scores: Scores) -> str:
    """The training set's file with its folder, the folder of its files, or their number.

    Where several training sets were compared, the name of this one.

    Runs of rollouts are named after their way of finding D_N, and are all made from the same files.
    """
    if scores["train"]["name"] != "train" and not scores.get("rollouts"):
        return str(scores["train"]["name"])
    paths = [PurePosixPath(entry["path"]) for entry in scores["provenance"]["inputs"] if entry["role"] == "train"]
    if not paths:
        return "the rollouts" if scores.get("rollouts") else "the training set"
    if len(paths) == 1:
        name = "/".join(part for part in paths[0].parts[-2:] if part != "/")
        return re.sub(r"@[0-9a-f]{16,}$", "", name)  # the revision of a data set of the hub
    if len({path.parent for path in paths}) > 1:
        return f"{len(paths)} sources"
    return f"{paths[0].parent.name or 'a folder'} ({len(paths)} files)"
