"""sts-fast validate and report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from sts_fast import files, results
from sts_fast.cli.console import err, out
from sts_fast.cli.options import JsonOption, SeedOption
from sts_fast.report import build_report
from sts_fast.validate import validate as run_validate


def validate(
    run: Annotated[Path, typer.Argument(help="Folder that sts-fast score wrote, or its scores.json.")],
    before: Annotated[Path, typer.Option("--before", help="Evaluation before training; or a CSV with the changes.")],
    after: Annotated[Path | None, typer.Option("--after", help="Evaluation after training.")] = None,
    metric: Annotated[str | None, typer.Option("--metric", help="Such as acc, or exact_match,strict-match.")] = None,
    estimator: Annotated[
        str, typer.Option("--estimator", help="act, icl, act_sq; ntk, step, adapter, or ntk_loss and so on.")
    ] = "act",
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Hold a forecast against what really changed, and say how much that can tell."""
    result = run_validate(run, before=before, after=after, metric=metric, estimator=estimator, seed=seed)
    text = results.to_json(result.to_dict())
    if run.is_dir():
        with files.atomic_path(run / results.VALIDATION_FILE) as path:
            path.write_text(text, encoding="utf-8")
        build_report(run)
    sys.stdout.write(text if as_json else result.to_text() + "\n")
    for warning in result.warnings:
        err.print(f"warning: {warning}", style="yellow", highlight=False, markup=False)


def report(run: Annotated[Path, typer.Argument(help="Folder that sts-fast score wrote.")]) -> None:
    """Write report.html of a run again, with the outcome if it has been validated."""
    out.print(str(build_report(run)), highlight=False, markup=False)
