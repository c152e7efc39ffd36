"""sts-fast rollouts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from sts_fast import files
from sts_fast.cli.arguments import fields, load_saes, plain_value, set_threads, typed_command
from sts_fast.cli.console import out, progress, say, show
from sts_fast.cli.options import (
    AnswerFieldOption,
    BatchTokensOption,
    ControlsChoice,
    ControlsOption,
    DemosOption,
    DeviceMapOption,
    DeviceOption,
    DomainShotsOption,
    DomainsOption,
    DtypeChoice,
    DtypeOption,
    EstimatorsOption,
    HookOption,
    JsonOption,
    LabelsOption,
    LayerOption,
    LimitOption,
    ModelOption,
    OutputOption,
    PrecisionOption,
    QuestionFieldOption,
    SaeDtypeOption,
    ScalingOption,
    SeedOption,
    ShotsOption,
    ShowPromptsOption,
    StrictOption,
    ThreadsOption,
    TokensChoice,
    TokensOption,
    TopNOption,
)
from sts_fast.cli.tables import print_comparison, print_end, print_signed
from sts_fast.errors import InputError
from sts_fast.forecast.compare import comparison
from sts_fast.forecast.run import COMPARISON_FILE, SIZES, Forecast, clear_earlier
from sts_fast.ops import backend
from sts_fast.report import build_comparison_report, build_report
from sts_fast.rollouts import WAYS, Columns, sample_rollouts
from sts_fast.rollouts import rollouts as forecast_rollouts
from sts_fast.rollouts.counts_text import counts_in_words

ROLLOUTS_FILE = "rollouts.jsonl"


def rollouts(
    model: ModelOption,
    sae: Annotated[str, typer.Option("--sae", help="SAE: folder or file, release/id, or owner/repository:folder.")],
    domains: DomainsOption,
    rollouts: Annotated[
        Path | None,
        typer.Option("--rollouts", help="File or folder of prompts, completions and rewards, as TRL or verl write it."),
    ] = None,
    train: Annotated[
        Path | None, typer.Option("--train", help="Questions to sample completions for, where there are no rollouts.")
    ] = None,
    sample: Annotated[int, typer.Option("--sample", help="Completions of each question of --train.")] = 8,
    check: Annotated[
        str | None,
        typer.Option("--check", help="What rewards them: exact, math, or package.module:function, which is run."),
    ] = None,
    temperature: Annotated[float, typer.Option("--temperature", help="Of sampling.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Longest completion sampled.")] = 256,
    ways: Annotated[str, typer.Option("--ways", help="Comma-separated: how the features are found.")] = ",".join(WAYS),
    tuned: Annotated[str | None, typer.Option("--tuned", help="The model after RL: adds its true shift.")] = None,
    verified_reward: Annotated[
        float | None, typer.Option("--verified-reward", help="Reward of a verified completion; default: the middle.")
    ] = None,
    prompt_field: Annotated[str | None, typer.Option("--prompt-field", help="Column of the prompts.")] = None,
    completion_field: Annotated[
        str | None, typer.Option("--completion-field", help="Column of the completions.")
    ] = None,
    reward_field: Annotated[
        list[str] | None, typer.Option("--reward-field", help="Column of the rewards; several are added up.")
    ] = None,
    group_field: Annotated[
        str | None, typer.Option("--group-field", help="Column that tells which completions belong together.")
    ] = None,
    demos: DemosOption = None,
    estimators: EstimatorsOption = "act,icl",
    controls: ControlsOption = ControlsChoice.features,
    shots: ShotsOption = 2,
    domain_shots: DomainShotsOption = 5,
    top_n: TopNOption = 100,
    tokens: TokensOption = TokensChoice.query,
    limit: LimitOption = 256,
    question_field: QuestionFieldOption = None,
    answer_field: AnswerFieldOption = None,
    hook: HookOption = None,
    layer: LayerOption = None,
    norm_scaling_factor: ScalingOption = None,
    strict: StrictOption = False,
    dtype: DtypeOption = DtypeChoice.auto,
    sae_dtype: SaeDtypeOption = None,
    device: DeviceOption = "auto",
    device_map: DeviceMapOption = None,
    batch_tokens: BatchTokensOption = None,
    labels: LabelsOption = None,
    precision: PrecisionOption = None,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    show_prompts: ShowPromptsOption = False,
    output: OutputOption = Path("sts-fast-rollouts"),
    as_json: JsonOption = False,
) -> None:
    """Forecast how strongly RL will move each domain, from the model's own completions and their rewards."""
    if (rollouts is None) == (train is None):
        raise InputError("give either --rollouts, or --train with --check to sample some")
    if train is not None and check is None:
        raise InputError(
            "--train needs --check, which rewards the sampled completions: exact, math or package:function"
        )
    if train is None and check is not None:
        raise InputError("--check rewards what is sampled for --train; completions of --rollouts have their rewards")
    files.prepare_folder(output)
    set_threads(threads)
    try:
        backend.set_precision(precision)
    except ValueError as error:
        raise InputError(f"--{error}") from error
    [loaded] = load_saes([sae], hook, layer, norm_scaling_factor, dtype=sae_dtype and str(sae_dtype))
    question_fields, answer_fields = fields("--question-field", question_field), fields("--answer-field", answer_field)
    columns = Columns(prompt_field, completion_field, reward_field or (), group_field)
    if train is not None and check is not None:
        with progress("questions") as tell:
            sampled = sample_rollouts(
                model=model, questions=train, check=check, n_samples=sample, temperature=temperature,
                max_new_tokens=max_new_tokens, limit=limit or None, seed=seed, dtype=str(dtype), device=device,
                device_map=plain_value(device_map),
                question_field=question_fields.pop("train", question_fields.get("")),
                answer_field=answer_fields.pop("train", answer_fields.get("")),
                progress=lambda done, total: tell("sampling completions", done, total),
            )  # fmt: skip
        rollouts, columns = output / ROLLOUTS_FILE, Columns()
        sampled.save(rollouts)
        say(f"Completions are in {rollouts}: give them as --rollouts to try other options")
    with progress() as tell:
        forecasts = forecast_rollouts(
            model=model, sae=loaded, rollouts=rollouts or "", columns=columns, domains=domains, demos=demos,
            tuned=tuned, ways=[name.strip() for name in ways.split(",")], verified_reward=verified_reward,  # type: ignore[misc]
            estimators=[name.strip() for name in estimators.split(",")],  # type: ignore[misc]
            controls=plain_value(controls), shots=shots, domain_shots=domain_shots, top_n=top_n,
            tokens=plain_value(tokens), limit=limit or None, question_fields=question_fields,
            answer_fields=answer_fields, strict=strict, dtype=str(dtype), sae_dtype=sae_dtype and str(sae_dtype),
            device=device, device_map=plain_value(device_map), batch_tokens=batch_tokens, labels=labels, seed=seed,
            command=typed_command(), progress=tell, say=say, show=show if show_prompts else None,
        )  # fmt: skip
    clear_earlier(output, [output / way for way in forecasts])
    for way, forecast in forecasts.items():
        forecast.save(output / way)
        build_report(output / way)
    compared = comparison(list(forecasts.values()))
    with files.atomic_path(output / COMPARISON_FILE) as path:
        path.write_text(files.to_json(compared), encoding="utf-8")
    build_comparison_report(output)
    if as_json:
        sys.stdout.write(files.to_json(compared))
        return
    one = next(iter(forecasts.values()))
    out.print(counts_in_words(one.rollouts or {}), highlight=False, markup=False)
    print_comparison({**compared, "scores": {name: of for name, of in compared["scores"].items() if name in SIZES}})
    _print_overlaps(forecasts)
    print_signed(one)  # the same whatever the way
    print_end(list(forecasts.values()), output)


def _print_overlaps(forecasts: dict[str, Forecast]) -> None:
    """How much of D_N the ways have in common; chance is what two random sets would."""
    names = [*forecasts, "most_active"]
    table = Table(title="Part of the features that two ways have in common", title_justify="left")
    table.add_column("way")
    for name in names:
        table.add_column(escape(name.replace("_", " ")), justify="right")
    for way, forecast in forecasts.items():
        shared = (forecast.rollouts or {})["overlaps"]
        table.add_row(way, *(f"{shared[name]:.0%}" if name in shared else "" for name in names))
    out.print(table)
    one = next(iter(forecasts.values()))
    out.print(f"By chance: {one.settings['top_n'] / one.sae['d_sae']:.1%}.", highlight=False)
