"""sts-fast ablate."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from sts_fast import files
from sts_fast.ablate import Ablation
from sts_fast.ablate import ablate as run_ablate
from sts_fast.ablate.findings import WORDS, main_outcome, short_amount
from sts_fast.cli.arguments import fields, load_saes, set_threads, typed_command
from sts_fast.cli.console import err, out, progress, say
from sts_fast.cli.options import (
    AnswerFieldOption,
    BatchTokensOption,
    DemosOption,
    DeviceMapOption,
    DeviceOption,
    DtypeChoice,
    DtypeOption,
    HookOption,
    JsonOption,
    LayerOption,
    QuestionFieldOption,
    SaeDtypeOption,
    SeedOption,
    StrictOption,
    ThreadsOption,
)
from sts_fast.errors import InputError
from sts_fast.forecast.run import SCORES_FILE, Run
from sts_fast.forecast.score import score
from sts_fast.report import build_report

OUTPUT = Path("sts-fast-ablation")


def ablate(
    run: Annotated[Path | None, typer.Argument(help="Folder of sts-fast score or shift; or none.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="The model, if not where the run says.")] = None,
    tuned: Annotated[str | None, typer.Option("--tuned", help="Zero them in this model, after training.")] = None,
    sae: Annotated[str | None, typer.Option("--sae", help="The run's SAE, if not where the run says.")] = None,
    train: Annotated[
        Path | None, typer.Option("--train", help="Training set; by default the run's, if it has signed forecasts.")
    ] = None,
    domains: Annotated[list[str] | None, typer.Option("--domains", help="As for score; repeatable.")] = None,
    demos: DemosOption = None,
    few_shot: Annotated[
        bool, typer.Option("--few-shot", help="Ask behind the run's number of demonstrations.")
    ] = False,
    top_n: Annotated[int | None, typer.Option("--top-n", help="How many of the most shifted features.")] = None,
    draws: Annotated[int, typer.Option("--draws", help="Sets of random and of least shifted features.")] = 5,
    shots: Annotated[int | None, typer.Option("--shots", help="Without a run: demonstrations for D_N.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Without a run: most prompts of a set.")] = None,
    question_field: QuestionFieldOption = None,
    answer_field: AnswerFieldOption = None,
    hook: HookOption = None,
    layer: LayerOption = None,
    norm_scaling_factor: Annotated[
        float | None, typer.Option("--norm-scaling-factor", help="As the run was made with.")
    ] = None,
    strict: StrictOption = False,
    dtype: DtypeOption = DtypeChoice.auto,
    sae_dtype: SaeDtypeOption = None,
    device: DeviceOption = "auto",
    device_map: DeviceMapOption = None,
    batch_tokens: BatchTokensOption = None,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder for the results; by default the run's own.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Zero the shifted features in the running model: does the trained ability go, do the others stay?"""
    if run is not None and (shots, limit, hook, layer) != (None,) * 4:
        raise InputError(
            "--shots, --limit, --hook and --layer are those of the run: leave them out, or make it again with them"
        )
    source = sae or (None if run is None else Run.load(run).scores["sae"]["source"])
    if source is None:
        raise InputError("give the folder of a run, or --model, --sae, --train and --domains")
    folder = output or run or OUTPUT
    set_threads(threads)
    files.prepare_folder(folder)
    read: dict[str, Any] = {
        "question_fields": fields("--question-field", question_field),
        "answer_fields": fields("--answer-field", answer_field),
        "strict": strict, "dtype": str(dtype), "sae_dtype": sae_dtype and str(sae_dtype), "device": device,
        "device_map": device_map, "batch_tokens": batch_tokens, "command": typed_command(),
    }  # fmt: skip
    factors = None if norm_scaling_factor is None else [norm_scaling_factor]
    [loaded] = load_saes([source], hook, layer, factors, dtype=read["sae_dtype"])
    with progress("sets") as tell:
        forecast: Any = run
        if run is None:
            if model is None or train is None or not domains:
                raise InputError("without the folder of a run, ablate needs --model, --sae, --train and --domains")
            asked: dict[str, Any] = {"train": train, "domains": domains, "estimators": ("act",), "seed": seed}
            asked |= {name: n for name, n in (("shots", shots), ("limit", limit), ("top_n", top_n)) if n is not None}
            forecast = score(model=model, sae=loaded, demos=demos, say=say, **asked, **read)
            forecast.save(folder)
        ablation = run_ablate(
            forecast, model=tuned or model, sae=loaded, train=train, domains=domains, demos=demos, few_shot=few_shot,
            top_n=top_n, n_draws=draws, seed=seed, progress=tell, say=None if run is None else say, **read,
        )  # fmt: skip
    ablation.save(folder)
    if as_json:
        sys.stdout.write(files.to_json(ablation.to_dict()))
    else:
        _print_ablation(ablation)
    if (folder / SCORES_FILE).is_file():
        build_report(folder)
    err.print(f"Results are in {folder}", highlight=False, markup=False, soft_wrap=True)


def _print_ablation(ablation: Ablation) -> None:
    document = ablation.to_dict()
    main = main_outcome(document)
    for outcome in (main, "accuracy"):
        what = WORDS[outcome].removeprefix("the ")
        asked = ", asked behind demonstrations" if document["few_shot"] else ""
        table = Table(title=f"Change of {what} when features are zeroed{asked}", title_justify="left", width=79)
        table.add_column("set", ratio=1, overflow="fold")
        for column in ("before", f"D_N ({document['top_n']})", "like activity (draws)", "random", "low shift"):
            table.add_column(column, justify="right")
        for one in document["sets"]:
            found = {name: condition[outcome] for name, condition in one["conditions"].items()}
            before = one["before"][outcome]
            of_draws = found["like_activity"]["draws"]
            draws = ", ".join(short_amount(outcome, draw) for draw in (min(of_draws), max(of_draws)))
            table.add_row(
                "training set" if one["kind"] == "train" else escape(one["name"]),
                f"{before:.3g}" if outcome == "loss" else f"{before:.1%}",
                short_amount(outcome, found["top"]["value"]),
                f"{short_amount(outcome, found['like_activity']['value'])} ({draws})",
                short_amount(outcome, found["random"]["value"]),
                short_amount(outcome, found["low_shift"]["value"]),
            )
        out.print(table)
    for finding in ablation.findings():
        out.print(finding, highlight=False, markup=False)
