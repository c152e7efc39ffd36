"""sts-fast validate and report."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from sts_fast import files
from sts_fast.cli.console import note, out, say
from sts_fast.cli.options import AsJson
from sts_fast.data.options import Option
from sts_fast.data.sets import Seed
from sts_fast.errors import InputError
from sts_fast.forecast.estimators import BY_NAME
from sts_fast.outcomes.calibration import fit_calibration
from sts_fast.outcomes.calibration.calibration import CALIBRATION_FILE
from sts_fast.outcomes.validate import validate as run_validate
from sts_fast.profile.library import Library
from sts_fast.report import build_comparison_report, build_library_report, build_report
from sts_fast.report.card import write_card
from sts_fast.report.comparison import has_comparison
from sts_fast.report.trackers import log_run


@dataclass(frozen=True)
class Evaluations:
    """Results that the forecast is held against, and how they are read."""

    before: Annotated[Path | None, Option("Evaluation before training; or a CSV with the changes.")] = None
    after: Annotated[Path | None, Option("Evaluation after training.")] = None
    metric: Annotated[
        list[str] | None,
        Option("Metric, such as acc, or exact_match,strict-match; or TASK=METRIC for one task; repeatable."),
    ] = None
    match: Annotated[
        list[str] | None, Option("DOMAIN=TASK: outcome of a domain, where the names do not match; repeatable.")
    ] = None
    strict: Annotated[
        bool, Option("Stop where before and after were evaluated differently, or name another model.")
    ] = False

    def matches(self) -> dict[str, str]:
        """Domain -> name of its outcome."""
        matches: dict[str, str] = {}
        for text in self.match or ():
            domain, _, task = text.partition("=")
            if not domain or not task:
                raise InputError(f"--match takes DOMAIN=TASK, not '{text}'")
            if domain in matches:
                raise InputError(f"--match is given twice for '{domain}': give it once")
            matches[domain] = task
        return matches


def validate(
    runs: Annotated[
        list[Path], typer.Argument(help="Folder that sts-fast score wrote; for --fit several, or a folder of them.")
    ],
    evaluations: Evaluations,
    estimator: Annotated[str | None, Option(f"Estimator of the scores: {', '.join(BY_NAME)}.")] = None,
    fit: Annotated[bool, Option("Learn to forecast changes with intervals, from past, validated runs.")] = False,
    output: Annotated[Path, Option("File for score --calibration, written by --fit.")] = Path(CALIBRATION_FILE),
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Compare a forecast with the measured change, and show how much that proves; or learn from many such runs."""
    if fit:
        if evaluations.before is not None or evaluations.after is not None:
            raise InputError("--fit reads the outcomes beside past runs: validate each run first, without --fit")
        _fit(runs, estimator, output, as_json=as_json)
        return
    if len(runs) > 1:
        raise InputError("forecasts are validated one at a time: give one run, or --fit to learn from several")
    if evaluations.before is None:
        raise InputError("--before is missing: give the evaluation before training, or a CSV with the changes")
    run = runs[0]
    result = run_validate(
        run,
        before=evaluations.before,
        after=evaluations.after,
        metric=evaluations.metric,
        match=evaluations.matches(),
        strict=evaluations.strict,
        estimator=estimator or "act",
        seed=seed,
    )
    if run.is_dir():
        result.save(run)
        build_report(run)
        if has_comparison(run.parent):
            build_comparison_report(run.parent)
    sys.stdout.write(files.to_json(result.to_dict()) if as_json else result.to_text() + "\n")
    for warning in result.warnings:
        say(f"warning: {warning}")


def _fit(runs: list[Path], estimator: str | None, output: Path, *, as_json: bool) -> None:
    calibration = fit_calibration(runs, estimator=estimator)
    calibration.save(output)
    sys.stdout.write(files.to_json(calibration.to_dict()) if as_json else calibration.to_text() + "\n")
    for warning in calibration.warnings:
        say(f"warning: {warning}")
    note(f"{output}: give it to sts-fast score --calibration")


def report(
    run: Annotated[
        Path, typer.Argument(help="Folder that sts-fast score or compare wrote, or a library of sts-fast profile.")
    ],
    sae: Annotated[str | None, Option("Of several SAEs in a library, the source of the one.")] = None,
    card: Annotated[bool, Option("Write README.md too, a run's card for the Hugging Face hub.")] = False,
    log_to: Annotated[
        str | None,
        Option("Send a run's numbers and report to tensorboard:DIR, wandb:PROJECT, trackio:PROJECT, mlflow:NAME."),
    ] = None,
) -> None:
    """Write report.html of a run or comparison again, with outcomes that were validated; or that of a library."""
    if log_to is not None:
        log_run(run, log_to)
        note(f"The run's numbers and its report are logged to {log_to}")
    if card:
        note(f"The card is {write_card(run)}")
    if len(Library(run)):
        written = build_library_report(run, sae=sae)
    else:
        written = build_comparison_report(run) if has_comparison(run) else build_report(run)
    out.print(str(written), highlight=False, markup=False, soft_wrap=True)
