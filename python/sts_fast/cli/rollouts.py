"""sts-fast rollouts."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from sts_fast import files
from sts_fast.cli.arguments import Core, Places, typed_command
from sts_fast.cli.console import progress, say, show
from sts_fast.cli.options import AsJson, Demos, Domains, Fixed, Model, ShowPrompts
from sts_fast.cli.output import Output
from sts_fast.cli.tables import print_end, print_rollouts
from sts_fast.data.options import Option
from sts_fast.errors import InputError
from sts_fast.forecast.compare import comparison
from sts_fast.forecast.run import COMPARISON_FILE
from sts_fast.report import build_comparison_report, build_report
from sts_fast.rollouts import Columns, sample_rollouts
from sts_fast.rollouts import rollouts as forecast_rollouts
from sts_fast.rollouts.rollouts import RolloutSettings
from sts_fast.rollouts.sample import Completing

ROLLOUTS_FILE = "rollouts.jsonl"


@dataclass(frozen=True)
class Sources:
    """Model, SAE, rollouts and domains of the forecast."""

    model: Model
    sae: Annotated[str, Option("SAE: folder or file, release/id, or owner/repository:folder.")]
    domains: Domains
    rollouts: Annotated[
        Path | None, Option("File or folder of prompts, completions and rewards, as TRL or verl write it.")
    ] = None
    train: Annotated[
        list[str] | None, Option("Questions to sample completions for, instead of --rollouts; several are one set.")
    ] = None
    check: Annotated[
        str | None, Option("Checker that rewards them: exact, math, or package.module:function, which is run.")
    ] = None
    tuned: Annotated[str | None, Option("The model after RL: adds its true shift.")] = None
    demos: Demos = None


def rollouts(
    sources: Sources,
    columns: Columns,
    completing: Completing,
    settings: Annotated[
        RolloutSettings, Fixed(dims="icl", signed_features="sae", trial_steps=None, trial_cost=None, trial_prompts=None)
    ],
    places: Places,
    core: Core,
    output: Output,
    show_prompts: ShowPrompts = False,
    as_json: AsJson = False,
) -> None:
    """Forecast how strongly RL will move each domain, from the model's own completions and their rewards."""
    train, check = sources.train, sources.check
    if (sources.rollouts is None) == (train is None):
        raise InputError("give either --rollouts, or --train with --check to sample some")
    if train is not None and check is None:
        raise InputError(
            "--train needs --check, which rewards the sampled completions: exact, math or package:function"
        )
    if train is None and check is not None:
        raise InputError("--check is for completions sampled for --train; --rollouts has rewards: leave --check out")
    with output.kept() as kept, output.folder() as results:
        core.apply()
        [loaded] = places.load([sources.sae], settings.sae_dtype)
        rollouts: Path | None = sources.rollouts
        if train is not None and check is not None:
            rollouts, columns = (kept.folder or results.folder) / ROLLOUTS_FILE, Columns()
            settings = _sampled(sources, completing, settings, check, rollouts, kept)
        with progress() as tell:
            settings = replace(
                settings, command=typed_command(), progress=tell, say=say, show=show if show_prompts else None,
                kept=kept,
            )  # fmt: skip
            forecasts = forecast_rollouts(
                model=sources.model, sae=loaded, rollouts=rollouts or "", columns=columns, domains=sources.domains,
                demos=sources.demos, tuned=sources.tuned,
                **{name: value for name, value in vars(settings).items() if name != "dims"},
            )  # fmt: skip
        if rollouts is not None and sources.rollouts is None:
            if rollouts.parent != results.folder:
                shutil.copyfile(rollouts, results.folder / ROLLOUTS_FILE)
            for entry in (entry for forecast in forecasts.values() for entry in forecast.provenance["inputs"]):
                if entry["path"] == str(rollouts):
                    entry["path"] = str(results.path / ROLLOUTS_FILE)
        for way, forecast in forecasts.items():
            forecast.save(results.folder / way)
            build_report(results.folder / way)
        compared = comparison(list(forecasts.values()))
        with files.atomic_path(results.folder / COMPARISON_FILE) as path:
            path.write_text(files.to_json(compared), encoding="utf-8")
        build_comparison_report(results.folder)
    if as_json:
        sys.stdout.write(files.to_json(compared))
        return
    print_rollouts(forecasts, compared)
    print_end(list(forecasts.values()), results.path)


def _sampled(
    sources: Sources,
    completing: Completing,
    settings: RolloutSettings,
    check: str,
    rollouts: Path,
    kept: files.Kept,
) -> RolloutSettings:
    """Samples completions into a file; returns the settings without the fields of the questions."""
    question_fields, answer_fields = dict(settings.question_fields), dict(settings.answer_fields)
    question_field = question_fields.pop("train", question_fields.get(""))
    answer_field = answer_fields.pop("train", answer_fields.get(""))
    with progress("questions") as tell:
        sample_rollouts(
            model=sources.model, questions=sources.train or [], check=check, question_field=question_field,
            answer_field=answer_field, kept=kept,
            progress=lambda done, total: tell("sampling completions", done, total), **vars(completing),
        ).save(rollouts)  # fmt: skip
    return replace(settings, question_fields=question_fields, answer_fields=answer_fields)
