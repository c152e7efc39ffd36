"""sts-fast score, compare and shift."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from sts_fast import files
from sts_fast.cli.arguments import Core, Places, named_trains, typed_command, typed_options
from sts_fast.cli.calibration import calibrated, print_warnings, read_calibration
from sts_fast.cli.console import out, progress, say, show
from sts_fast.cli.options import AsJson, Demos, Domains, Fixed, Model, SAEs, ShowPrompts, Train
from sts_fast.cli.output import Output
from sts_fast.cli.tables import (
    by_sae,
    print_agreement,
    print_comparison,
    print_end,
    print_forecast,
    print_outlook,
    print_sae,
    print_shift,
)
from sts_fast.data.options import Option
from sts_fast.data.sources import check_places
from sts_fast.errors import InputError, listed
from sts_fast.files import Document
from sts_fast.forecast.compare import comparison, sae_comparison, sae_names
from sts_fast.forecast.cost import Outlook
from sts_fast.forecast.from_library import compare_stored
from sts_fast.forecast.options import Dims, Settings
from sts_fast.forecast.run import COMPARISON_FILE, Forecast
from sts_fast.forecast.score import compare as run_compare
from sts_fast.forecast.score import plan
from sts_fast.model.stored import is_activations
from sts_fast.report import build_comparison_report, build_report

Tuned = Annotated[str | None, Option("The model after training, for --dims tuned.")]
OrLibrary = Annotated[
    str | None,
    Option(
        "Model: folder or hub id; or a folder of sts-fast capture. Without one, --train and --domains name sets of "
        "--library."
    ),
]

# Options of a forecast from a library alone; the others decide how sets are read, or need the model.
WITH_LIBRARY = (
    "--library", "--train", "--domains", "--sae", "--dims", "--estimators", "--top-n", "--seed", "--output", "--json",
    "--threads", "--overwrite", "--config", "--quiet",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Model, SAEs and sets of one training set's forecasts; without a model, sets of a library by their names."""

    model: OrLibrary = None
    sae: SAEs = field(default_factory=list)
    train: Train
    domains: Domains = field(default_factory=list)
    demos: Demos = None
    tuned: Tuned = None


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Model, SAEs and sets of the forecasts of several training sets; or a library's, as Sources."""

    model: OrLibrary = None
    sae: SAEs = field(default_factory=list)
    train: Annotated[list[str], Option("A candidate training set: path, or name=path; repeatable, one name too.")]
    domains: Domains = field(default_factory=list)
    demos: Demos = None
    tuned: None = None


@dataclass(frozen=True, kw_only=True)
class Shifting:
    """Model, SAEs and training set of a shift."""

    model: Model
    sae: SAEs
    train: Train
    domains: Domains = field(default_factory=list)
    demos: Demos = None
    tuned: Tuned = None


@dataclass(frozen=True)
class ComparedSettings(Settings):
    dims: Annotated[Dims, Option("icl or active.")] = "icl"


AnySources = Sources | Candidates | Shifting


@dataclass(frozen=True)
class How(Core):
    """Options that change no score: output beside it, and computation."""

    calibration: Annotated[
        Path | None,
        Option("Forecast changes with intervals, by this file of sts-fast validate --fit."),
    ] = None
    show_prompts: ShowPrompts = False
    dry_run: Annotated[bool, Option("Run nothing; show what would be read, and what it would cost.")] = False


def score(
    sources: Sources,
    settings: Settings,
    places: Places,
    how: How,
    output: Output,
    as_json: AsJson = False,
) -> None:
    """Forecast how strongly training on a set will move each domain."""
    _needed(sources, "domains")
    if how.dry_run:
        print_outlook(outlook(sources, {"train": sources.train}, settings, places, how), as_json=as_json)
        return
    forecasts, folder = _forecasts(sources, {"train": sources.train}, settings, places, how, output)
    if as_json:
        _write_json(forecasts, folder, compared=len(forecasts) > 1)
        return
    for forecast in forecasts:
        print_sae(forecast, forecasts)
        print_forecast(forecast)
    if sources.model is not None and "trial" not in settings.estimators:
        out.print(
            "On a real model these scores said little of what moved, but a short trial did: add trial to --estimators."
        )
    print_agreement(forecasts)
    print_end(forecasts, folder)


def compare(
    sources: Candidates,
    settings: ComparedSettings,
    places: Places,
    how: How,
    output: Output,
    as_json: AsJson = False,
) -> None:
    """Forecast several candidate training sets side by side, each domain passed through the model once."""
    _needed(sources, "domains")
    trains = named_trains(sources.train) if sources.model is not None else {name: [name] for name in sources.train}
    if how.dry_run:
        print_outlook(outlook(sources, trains, settings, places, how), as_json=as_json)
        return
    forecasts, folder = _forecasts(sources, trains, settings, places, how, output, by_train=True)
    if as_json:
        _write_json(forecasts, folder, compared=True)
        return
    for of_sae in by_sae(forecasts):
        print_sae(of_sae[0], forecasts)
        print_comparison(comparison(of_sae))
    print_agreement(forecasts)
    print_end(forecasts, folder)


def shift(
    sources: Annotated[Shifting, Fixed(domains=[])],
    settings: Annotated[
        Settings,
        Fixed(
            estimators=("act",),
            domain_shots=1,
            signed_features="sae",
            trial_steps=None,
            trial_cost=None,
            trial_prompts=None,
            controls="features",
            labels=None,
        ),
    ],
    places: Places,
    how: Annotated[How, Fixed(calibration=None)],
    output: Output,
    as_json: AsJson = False,
) -> None:
    """Measure which features a training set shifts, without scoring any domain."""
    if how.dry_run:
        print_outlook(outlook(sources, {"train": sources.train}, settings, places, how), as_json=as_json)
        return
    forecasts, folder = _forecasts(sources, {"train": sources.train}, settings, places, how, output)
    if as_json:
        _write_json(forecasts, folder, compared=len(forecasts) > 1)
        return
    for forecast in forecasts:
        print_sae(forecast, forecasts)
        print_shift(forecast, n_features=20)
    print_end(forecasts, folder)


def outlook(sources: AnySources, trains: dict[str, list[str]], settings: Settings, places: Places, how: How) -> Outlook:
    """The prompts that forecasts of some training sets will read, and their cost."""
    if sources.model is None:
        raise InputError("a forecast from a library reads nothing, so --dry-run has nothing to tell: give --model")
    if how.calibration is not None:
        read_calibration(how.calibration, settings, len(sources.sae))
    how.apply()
    check_places([place for places in trains.values() for place in places])
    return plan(
        model=sources.model,
        sae=places.load(_needed(sources, "sae"), settings.sae_dtype),
        trains=trains,
        domains=sources.domains,
        demos=sources.demos,
        tuned=sources.tuned,
        **vars(replace(settings, say=say, show=show if how.show_prompts else None)),
    )


def _forecasts(
    sources: AnySources,
    trains: dict[str, list[str]],
    settings: Settings,
    places: Places,
    how: How,
    output: Output,
    *,
    by_train: bool = False,
) -> tuple[list[Forecast], Path]:
    """Runs the forecasts of one or more training sets with one or more SAEs, and saves each in its folder.

    The folder is that of the results, which is returned; with several SAEs, one below it for each, and `by_train` one
    more level for each training set.
    """
    if sources.model is None:
        _library_of(settings)
    calibration = None
    if how.calibration is not None:
        calibration = read_calibration(how.calibration, settings, len(sources.sae))
    refused: str | None = None
    with output.kept() as kept, output.folder() as results:
        how.apply()
        if not is_activations(sources.model):  # these are read fast
            settings = replace(settings, kept=kept)
        settings = replace(settings, command=typed_command(), say=say)
        if sources.model is None:
            names, of_saes = [""], [_from_library(sources, trains, settings)]
        else:
            names, of_saes = _from_model(sources, trains, settings, places, how)
        folders = [results.folder / name if len(names) > 1 else results.folder for name in names]
        for of_sae, forecasts in zip(folders, of_saes, strict=True):
            for name, forecast in forecasts.items():
                folder = of_sae / name if by_train else of_sae
                if calibration is not None and how.calibration is not None:
                    try:
                        forecasts[name] = forecast = calibrated(forecast, calibration, how.calibration)
                    except InputError as error:  # the scores are still valid
                        refused = str(error)
                folder.mkdir(parents=True, exist_ok=True)
                forecast.write(folder)
                build_report(folder)
            if by_train:
                _save_comparison(comparison(list(forecasts.values())), of_sae)
                build_comparison_report(of_sae)
        everything = [forecast for forecasts in of_saes for forecast in forecasts.values()]
        if len(names) > 1:
            _save_comparison(sae_comparison(everything), results.folder)
    if refused is not None:
        raise InputError(f"{refused}; the scores without changes are in {results.path}")
    print_warnings(everything)
    return everything, results.path


def _from_model(
    sources: AnySources, trains: dict[str, list[str]], settings: Settings, places: Places, how: How
) -> tuple[list[str], list[dict[str, Forecast]]]:
    """Names of the SAEs, and the forecasts with each by training set."""
    check_places([place for places in trains.values() for place in places])
    loaded = places.load(_needed(sources, "sae"), settings.sae_dtype)
    with progress() as tell:
        of_saes = run_compare(
            model=sources.model or "",
            sae=loaded,
            trains=trains,
            domains=sources.domains,
            demos=sources.demos,
            tuned=sources.tuned,
            **vars(replace(settings, progress=tell, show=show if how.show_prompts else None)),
        )
    return sae_names([(sae.source, sae.hook_name) for sae in loaded]), of_saes


def _from_library(sources: AnySources, trains: dict[str, list[str]], settings: Settings) -> dict[str, Forecast]:
    """The forecasts of sets that a library has, by their names."""
    if len(sources.sae) > 1:
        raise InputError("a library is read with one SAE at a time: give one --sae")
    domains = [name.strip() for row in sources.domains for name in row.split(",") if name.strip()]
    names = [name for of_train in trains.values() for name in of_train]
    if unusable := [name for name in names if "/" in name or name in (".", "..")]:
        raise InputError(f"a run's folder cannot be called {listed(unusable)}: make the profile under another name")
    if len(names) > len(trains):
        raise InputError("sets of a library are not joined: give one --train, or several to sts-fast compare")
    found = compare_stored(
        _library_of(settings), names, domains or None,
        sae=sources.sae[0] if sources.sae else None, estimators=settings.estimators, dims=settings.dims,
        top_n=settings.top_n, seed=settings.seed, command=settings.command,
    )  # fmt: skip
    return {name: found[name] for name in names}


def _library_of(settings: Settings) -> str | Path:
    """Returns the library's place. Raises InputError without one, or for typed options that it cannot serve."""
    if settings.library is None:
        raise InputError("give the model with --model, or --library with the profiles of these sets")
    if typed := [option for option in typed_options() if option not in WITH_LIBRARY]:
        raise InputError(
            f"without a model, sets stay as the library read them: omit {listed(typed)}, or give --model and --sae"
        )
    return settings.library


def _needed(sources: AnySources, option: str) -> list[str]:
    """Returns the values of an option. Raises InputError where a model was given and they were not."""
    given: list[str] = getattr(sources, option)
    if sources.model is not None and not given:
        raise InputError(f"with --model, give --{option} too")
    return given


def _save_comparison(comparison: Document, folder: Path) -> None:
    with files.atomic_path(folder / COMPARISON_FILE) as path:
        path.write_text(files.to_json(comparison), encoding="utf-8")


def _write_json(forecasts: list[Forecast], output: Path, *, compared: bool) -> None:
    """Prints the content of compare.json or, for one training set and one SAE, of scores.json."""
    sys.stdout.write(
        (output / COMPARISON_FILE).read_text(encoding="utf-8") if compared else files.to_json(forecasts[0].to_dict())
    )
