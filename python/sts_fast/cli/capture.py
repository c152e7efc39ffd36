"""sts-fast capture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sts_fast.cli.arguments import fields, load_saes, named_trains
from sts_fast.cli.console import err, progress, say
from sts_fast.cli.options import (
    AnswerFieldOption,
    BatchTokensOption,
    DemosOption,
    DeviceMapOption,
    DeviceOption,
    DimsChoice,
    DomainShotsOption,
    DtypeChoice,
    DtypeOption,
    LimitOption,
    QuestionFieldOption,
    SaeDtypeChoice,
    SeedOption,
    ShotsOption,
    TokensChoice,
    TokensOption,
)
from sts_fast.errors import InputError
from sts_fast.model.stored.writing import capture_activations
from sts_fast.places import place_name


def capture(
    model: Annotated[str, typer.Option("--model", help="Model: folder or hub id.")],
    train: Annotated[list[str], typer.Option("--train", help="A training set: path, or name=path; repeatable.")],
    output: Annotated[Path, typer.Option("--output", help="Folder for the activations; a part of them is completed.")],
    sae: Annotated[list[str] | None, typer.Option("--sae", help="Read where this SAE reads; repeatable.")] = None,
    domains: Annotated[list[str] | None, typer.Option("--domains", help="As for score; repeatable.")] = None,
    demos: DemosOption = None,
    dims: Annotated[
        DimsChoice, typer.Option("--dims", help="active: the training sets without demonstrations.")
    ] = DimsChoice.icl,
    estimators: Annotated[
        str, typer.Option("--estimators", help="Without icl: the domains without demonstrations.")
    ] = "act,icl",
    shots: ShotsOption = 2,
    domain_shots: DomainShotsOption = 5,
    tokens: TokensOption = TokensChoice.query,
    limit: LimitOption = 256,
    question_field: QuestionFieldOption = None,
    answer_field: AnswerFieldOption = None,
    hook: Annotated[
        list[str] | None, typer.Option("--hook", help="A place to read: blocks.12.hook_mlp_out, or a module's path.")
    ] = None,
    layer: Annotated[list[int] | None, typer.Option("--layer", help="Read after this layer; repeatable.")] = None,
    dtype: DtypeOption = DtypeChoice.auto,
    activation_dtype: Annotated[
        SaeDtypeChoice, typer.Option("--activation-dtype", help="Of the files; float32 rounds nothing.")
    ] = SaeDtypeChoice.bfloat16,
    device: DeviceOption = "auto",
    device_map: DeviceMapOption = None,
    batch_tokens: BatchTokensOption = None,
    seed: SeedOption = 0,
) -> None:
    """Write what a forecast reads of a model to files, for other SAEs and settings without the model."""
    if dims == DimsChoice.tuned:
        raise InputError("--dims tuned needs the model after training, whose activations are not captured")
    trains = {"train": Path(train[0])} if len(train) == 1 and Path(train[0]).exists() else named_trains(train)
    for path in trains.values():
        if not path.exists():
            raise InputError(f"there is no training set {path}: give a file or folder with --train")
    saes = load_saes(sae, None, None, None, dtype=None) if sae else []
    with progress() as tell:
        captured = capture_activations(
            model=model,
            output=output,
            trains=trains,
            domains=domains or [],
            demos=demos,
            saes=saes,
            hooks=[*(hook or []), *(place_name("resid_post", one) for one in layer or [])],
            train_demos=dims == DimsChoice.icl,
            domain_demos="icl" in [name.strip() for name in estimators.split(",")],
            shots=shots,
            domain_shots=domain_shots,
            tokens=str(tokens),  # type: ignore[arg-type]
            limit=limit or None,
            seed=seed,
            dtype=str(dtype),
            activation_dtype=str(activation_dtype),
            device=device,
            device_map=device_map,
            batch_tokens=batch_tokens,
            question_fields=fields("--question-field", question_field),
            answer_fields=fields("--answer-field", answer_field),
            progress=tell,
            say=say,
        )
    err.print(
        f"{output} holds {captured.summary()}: give it as --model to shift, score or compare",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
