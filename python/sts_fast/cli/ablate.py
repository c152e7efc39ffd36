"""sts-fast ablate."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from sts_fast import files
from sts_fast.ablate import Ablation
from sts_fast.ablate import ablate as run_ablate
from sts_fast.ablate.ablate import Zeroing
from sts_fast.ablate.findings import WORDS, main_outcome, short_amount
from sts_fast.cli.arguments import Places, Threads, set_threads, typed_command
from sts_fast.cli.console import Table, note, out, progress, say
from sts_fast.cli.options import AsJson, Demos
from sts_fast.cli.output import Output, kept_beside
from sts_fast.data.options import Option, part
from sts_fast.data.sets import Fields
from sts_fast.errors import InputError
from sts_fast.forecast.run import SCORES_FILE, Forecast, Run
from sts_fast.forecast.score import score
from sts_fast.model.session import Reading
from sts_fast.report import build_report
from sts_fast.sae import SAE


@dataclass(frozen=True)
class Sources:
    """The model, SAE and sets of an ablation; by default those of the run."""

    model: Annotated[str | None, Option("The run's model, if it has moved.")] = None
    tuned: Annotated[str | None, Option("Zero the features in this model, after training.")] = None
    sae: Annotated[str | None, Option("The run's SAE, if it has moved.")] = None
    train: Annotated[
        list[str] | None, Option("Training set; by default the run's, if it has signed forecasts; several are one set.")
    ] = None
    domains: Annotated[list[str] | None, Option("As for score; repeatable.")] = None
    demos: Demos = None
    shots: Annotated[int | None, Option("Without a run: demonstrations for D_N.")] = None
    limit: Annotated[int | None, Option("Without a run: most prompts of a set.")] = None


@dataclass(frozen=True)
class RunPlaces(Places):
    norm_scaling_factor: Annotated[list[float] | None, Option("The same as for the run.")] = None


@dataclass(frozen=True)
class AblationOutput(Output):
    output: Annotated[Path | None, Option("Folder for the results; by default the run's own.")] = None
    overwrite: Annotated[bool, Option("Without a run: replace the results that --output holds.")] = False

    @contextmanager
    def beside(self, run: Path | None) -> Iterator[files.Results]:
        """The folder that an ablation is written to: that of its run, or of new results."""
        if run is None:
            with self.folder() as results:
                yield results
            return
        if self.overwrite:
            raise InputError("--overwrite is for an ablation without a run: leave it out, one of a run is replaced")
        folder = self.output or run
        files.prepare_folder(folder)
        yield files.Results(folder, folder)


def ablate(
    sources: Sources,
    zeroing: Zeroing,
    places: RunPlaces,
    output: AblationOutput,
    run: Annotated[Path | None, typer.Argument(help="Folder of sts-fast score or shift; optional.")] = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Zero the shifted features in the running model: does the trained ability disappear, do the others stay?"""
    if run is not None and (sources.shots, sources.limit, places.hook, places.layer) != (None,) * 4:
        raise InputError(
            "--shots, --limit, --hook and --layer are taken from the run: leave them out, or make the run again with "
            "them"
        )
    sae = sources.sae or (None if run is None else Run.load(run).scores["sae"]["source"])
    if sae is None:
        raise InputError("give the folder of a run, or --model, --sae, --train and --domains")
    keeping = output.kept() if run is None else kept_beside(output.output or run)
    with keeping as kept, output.beside(run) as results:
        set_threads(threads)
        [loaded] = places.load([sae], zeroing.sae_dtype)
        with progress("sets") as tell:
            zeroing = replace(zeroing, command=typed_command(), kept=kept)
            forecast: Forecast | Path = _forecast(sources, zeroing, loaded) if run is None else run
            zeroing = replace(zeroing, progress=tell, say=None if run is None else say)
            ablation = run_ablate(
                forecast, model=sources.tuned or sources.model, sae=loaded, train=sources.train,
                domains=sources.domains, demos=sources.demos, **vars(zeroing),
            )  # fmt: skip
        if isinstance(forecast, Forecast):
            forecast.write(results.folder)
        ablation.save(results.folder)
        if (results.folder / SCORES_FILE).is_file():
            build_report(results.folder)
    if as_json:
        sys.stdout.write(files.to_json(ablation.to_dict()))
    else:
        _print_ablation(ablation)
    note(f"Results are in {results.path}")


def _forecast(sources: Sources, zeroing: Zeroing, sae: SAE) -> Forecast:
    """The forecast of a training set whose features are zeroed, where there is no run yet."""
    if sources.model is None or sources.train is None or not sources.domains:
        raise InputError("without the folder of a run, ablate needs --model, --sae, --train and --domains")
    given = {"shots": sources.shots, "limit": sources.limit, "top_n": zeroing.top_n}
    settings: dict[str, Any] = {
        **vars(part(Reading, zeroing)),
        **vars(part(Fields, zeroing)),
        **{name: value for name, value in given.items() if value is not None},
        "estimators": ("act",),
        "seed": zeroing.seed,
        "say": say,
    }
    return score(
        model=sources.model, sae=sae, train=sources.train, domains=sources.domains, demos=sources.demos, **settings
    )


def _print_ablation(ablation: Ablation) -> None:
    document = ablation.to_dict()
    main = main_outcome(document)
    for outcome in (main, "accuracy"):
        what = WORDS[outcome].removeprefix("the ")
        demonstrated = ", asked after demonstrations" if document["few_shot"] else ""
        table = Table(title=f"Change of {what} when features are zeroed{demonstrated}", title_justify="left", width=79)
        table.add_column("set", ratio=1, overflow="fold")
        for column in ("before", f"D_N ({document['top_n']})", "similar activity\n(draws)", "random", "low shift"):
            table.add_column(column, justify="right")
        for answered_set in document["sets"]:
            effects = {name: condition[outcome] for name, condition in answered_set["conditions"].items()}
            before = answered_set["before"][outcome]
            of_draws = effects["like_activity"]["draws"]
            draws = ", ".join(short_amount(outcome, draw) for draw in (min(of_draws), max(of_draws)))
            table.add_row(
                "training set" if answered_set["kind"] == "train" else escape(answered_set["name"]),
                f"{before:.3g}" if outcome == "loss" else f"{before:.1%}",
                short_amount(outcome, effects["top"]["value"]),
                f"{short_amount(outcome, effects['like_activity']['value'])}\n({draws})",
                short_amount(outcome, effects["random"]["value"]),
                short_amount(outcome, effects["low_shift"]["value"]),
            )
        out.print(table)
    for finding in ablation.findings():
        out.print(finding, highlight=False, markup=False)
