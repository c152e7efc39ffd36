"""sts-fast mix."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from sts_fast import files
from sts_fast.cli.arguments import fields, load_saes, set_threads, typed_command
from sts_fast.cli.console import err, out, progress, say
from sts_fast.cli.options import (
    AnswerFieldOption,
    BatchTokensOption,
    DeviceMapOption,
    DeviceOption,
    DomainsOption,
    DtypeChoice,
    DtypeOption,
    HookOption,
    JsonOption,
    LayerOption,
    LimitOption,
    QuestionFieldOption,
    SaeDtypeOption,
    ScalingOption,
    SeedOption,
    StrictOption,
    ThreadsOption,
    TrainOption,
)
from sts_fast.errors import InputError
from sts_fast.forecast.run import SIZES
from sts_fast.mix.mix import LOSS_LEFT, MIXED_FILE, MixedSet, Mixture
from sts_fast.mix.mix import mix as run_mix


class RuleChoice(StrEnum):
    forecast = "forecast"
    proportional = "proportional"
    uniform = "uniform"


def mix(
    train: TrainOption,
    domains: DomainsOption,
    budget: Annotated[int, typer.Option("--budget", help="How many examples to add to the training set.")],
    rule: Annotated[
        RuleChoice, typer.Option("--rule", help="Least forecast loss; in proportion to STS (--from); or evenly.")
    ] = RuleChoice.forecast,
    model: Annotated[str | None, typer.Option("--model", help="Model: folder or hub id; for a forecast.")] = None,
    sae: Annotated[str | None, typer.Option("--sae", help="SAE of the model, as for score; for a forecast.")] = None,
    run: Annotated[
        Path | None, typer.Option("--from", help="Run of sts-fast score over these domains, for --rule proportional.")
    ] = None,
    estimator: Annotated[
        str | None, typer.Option("--estimator", help=f"Which scores of that run: {', '.join(SIZES)}.")
    ] = None,
    weight: Annotated[
        list[str] | None, typer.Option("--weight", help="What a set's loss counts, as law=2 or train=0.5; repeatable.")
    ] = None,
    protect: Annotated[
        list[str] | None, typer.Option("--protect", help="A domain that counts, where others do not; repeatable.")
    ] = None,
    loss_left: Annotated[
        float, typer.Option("--loss-left", help="Share of the training set's loss that training alone would leave.")
    ] = LOSS_LEFT,
    limit: LimitOption = 64,
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
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    output: Annotated[Path, typer.Option("--output", help="Folder for mix.json and the mixed training set.")] = Path(
        "sts-fast-mix"
    ),
    as_json: JsonOption = False,
) -> None:
    """Say what to mix into a training set so that other abilities keep, and write the mixed set."""
    if limit < 0:
        raise InputError(f"--limit must be at least 1, or 0 for all, not {limit}")
    set_threads(threads)
    files.prepare_folder(output)
    where, held_as = (hook, layer, norm_scaling_factor), sae_dtype and str(sae_dtype)
    loaded = None if sae is None else load_saes([sae], *where, dtype=held_as)[0]
    with progress() as tell:
        mixture = run_mix(
            train=train,
            domains=domains,
            budget=budget,
            rule=str(rule),  # type: ignore[arg-type]
            model=model,
            sae=loaded,
            scores=run,
            estimator=estimator,
            weights=_weights(weight or []),
            protect=protect or [],
            loss_left=loss_left,
            limit=limit or None,
            seed=seed,
            strict=strict,
            dtype=str(dtype),
            sae_dtype=held_as,
            device=device,
            device_map=device_map,
            batch_tokens=batch_tokens,
            question_fields=fields("--question-field", question_field),
            answer_fields=fields("--answer-field", answer_field),
            command=typed_command(),
            progress=tell,
            say=say,
        )
    mixture.save(output)
    if as_json:
        sys.stdout.write(files.to_json(mixture.to_dict()))
    else:
        _print_mixture(mixture)
    err.print(f"Train on {output / MIXED_FILE}", highlight=False, markup=False, soft_wrap=True)


def _weights(values: list[str]) -> dict[str, float]:
    weights = {}
    for value in values:
        name, equals, number = value.rpartition("=")
        if name in weights:
            raise InputError(f"--weight is given twice for '{name}': give it once")
        try:
            weights[name] = float(number)
        except ValueError:
            equals = ""
        if not equals:
            raise InputError(f"--weight takes SET=NUMBER, not '{value}'")
    return weights


def _print_mixture(mixture: Mixture) -> None:
    forecast = mixture.mean_change is not None
    table = Table(title=f"{mixture.budget} further examples, rule {mixture.rule}", title_justify="left", width=79)
    table.add_column("set", ratio=1)
    for column in ("share", "examples", *(("loss", "alone", "mixed [95%]") if forecast else ())):
        table.add_column(column, justify="right", no_wrap=True)

    def add(one: MixedSet, share: str) -> None:
        cells = [escape(one.name), share, str(one.n_examples)]
        if one.loss is not None and one.mixed_ci is not None:
            low, high = one.mixed_ci
            cells += [f"{one.loss:.3f}", f"{one.alone:+.3f}", f"{one.mixed:+.3f} [{low:+.3f}, {high:+.3f}]"]
        table.add_row(*cells)

    add(mixture.train, "")
    for domain in sorted(mixture.domains, key=lambda domain: -domain.n_examples):
        add(domain, f"{domain.share:.0%}")
    out.print(table)
    if mixture.mean_change is not None:
        alone, mixed = mixture.mean_change["alone"], mixture.mean_change["mixed"]
        out.print(
            "Forecast change of the loss, in nats per token of the answers, by training on the training set alone "
            f"and on the mixture. Mean over domains: {alone:+.3f} alone, {mixed:+.3f} mixed. Less is better.",
            highlight=False,
        )
