"""sts-fast score, compare and shift."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sts_fast import files
from sts_fast.cli.arguments import fields, load_saes, named_trains, plain_value, set_threads, typed_command
from sts_fast.cli.calibration import (
    calibrated,
    print_change_comparison,
    print_changes,
    print_warnings,
    read_calibration,
)
from sts_fast.cli.console import progress, say, show
from sts_fast.cli.options import (
    AnswerFieldOption,
    BatchTokensOption,
    CalibrationOption,
    ControlsChoice,
    ControlsOption,
    DemosOption,
    DeviceMapOption,
    DeviceOption,
    DimsChoice,
    DimsOption,
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
    SaeOption,
    ScalingOption,
    SeedOption,
    ShotsOption,
    ShowPromptsOption,
    SignedFeaturesChoice,
    SignedFeaturesOption,
    StrictOption,
    ThreadsOption,
    TokensChoice,
    TokensOption,
    TopNOption,
    TrainOption,
    TunedOption,
)
from sts_fast.cli.tables import (
    by_sae,
    print_agreement,
    print_comparison,
    print_end,
    print_sae,
    print_scores,
    print_shift,
    print_signed,
)
from sts_fast.errors import InputError
from sts_fast.forecast.compare import comparison, sae_comparison, sae_names
from sts_fast.forecast.run import COMPARISON_FILE, Forecast, clear_earlier
from sts_fast.forecast.score import compare as run_compare
from sts_fast.ops import backend
from sts_fast.report import build_comparison_report, build_report


def score(
    model: ModelOption,
    sae: SaeOption,
    train: TrainOption,
    domains: DomainsOption,
    demos: DemosOption = None,
    tuned: TunedOption = None,
    dims: DimsOption = DimsChoice.icl,
    estimators: EstimatorsOption = "act,icl",
    signed_features: SignedFeaturesOption = SignedFeaturesChoice.sae,
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
    calibration: CalibrationOption = None,
    precision: PrecisionOption = None,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    show_prompts: ShowPromptsOption = False,
    output: OutputOption = Path("sts-fast-run"),
    as_json: JsonOption = False,
) -> None:
    """Forecast how strongly training on a set will move each domain."""
    forecasts = _forecasts(
        model, sae, {"train": train}, output,
        domains=domains, demos=demos, tuned=tuned, dims=dims, estimators=estimators,
        signed_features=signed_features, controls=controls, shots=shots,
        domain_shots=domain_shots, top_n=top_n, tokens=tokens, limit=limit, question_field=question_field,
        answer_field=answer_field, hook=hook, layer=layer,
        norm_scaling_factor=norm_scaling_factor, strict=strict, dtype=dtype, sae_dtype=sae_dtype, device=device,
        device_map=device_map, batch_tokens=batch_tokens, labels=labels, calibration=calibration,
        precision=precision, threads=threads,
        seed=seed, show_prompts=show_prompts,
    )  # fmt: skip
    if as_json:
        _write_json(forecasts, output, compared=len(forecasts) > 1)
        return
    for forecast in forecasts:
        print_sae(forecast, forecasts)
        print_shift(forecast, n_features=5)
        print_scores(forecast)
        print_signed(forecast)
        print_changes(forecast)
    print_agreement(forecasts)
    print_end(forecasts, output)


def compare(
    model: ModelOption,
    sae: SaeOption,
    train: Annotated[
        list[str], typer.Option("--train", help="A candidate training set: path, or name=path; repeatable.")
    ],
    domains: DomainsOption,
    demos: DemosOption = None,
    dims: Annotated[DimsChoice, typer.Option("--dims", help="icl or active.")] = DimsChoice.icl,
    estimators: EstimatorsOption = "act,icl",
    signed_features: SignedFeaturesOption = SignedFeaturesChoice.sae,
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
    calibration: CalibrationOption = None,
    precision: PrecisionOption = None,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    show_prompts: ShowPromptsOption = False,
    output: OutputOption = Path("sts-fast-compare"),
    as_json: JsonOption = False,
) -> None:
    """Forecast several candidate training sets side by side, each domain passed through the model once."""
    trains = named_trains(train)
    forecasts = _forecasts(
        model, sae, trains, output, by_train=True,
        domains=domains, demos=demos, dims=dims, estimators=estimators,
        signed_features=signed_features, controls=controls, shots=shots,
        domain_shots=domain_shots, top_n=top_n, tokens=tokens, limit=limit, question_field=question_field,
        answer_field=answer_field, hook=hook, layer=layer,
        norm_scaling_factor=norm_scaling_factor, strict=strict, dtype=dtype, sae_dtype=sae_dtype, device=device,
        device_map=device_map, batch_tokens=batch_tokens, labels=labels, calibration=calibration,
        precision=precision, threads=threads,
        seed=seed, show_prompts=show_prompts,
    )  # fmt: skip
    if as_json:
        _write_json(forecasts, output, compared=True)
        return
    for of_sae in by_sae(forecasts):
        print_sae(of_sae[0], forecasts)
        compared = comparison(of_sae)
        print_comparison(compared)
        print_change_comparison(compared)
    print_agreement(forecasts)
    print_end(forecasts, output)


def shift(
    model: ModelOption,
    sae: SaeOption,
    train: TrainOption,
    demos: DemosOption = None,
    tuned: TunedOption = None,
    dims: DimsOption = DimsChoice.icl,
    shots: ShotsOption = 2,
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
    precision: PrecisionOption = None,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    show_prompts: ShowPromptsOption = False,
    output: OutputOption = Path("sts-fast-run"),
    as_json: JsonOption = False,
) -> None:
    """Measure which features a training set shifts, without scoring any domain."""
    forecasts = _forecasts(
        model, sae, {"train": train}, output,
        domains=[], demos=demos, tuned=tuned, dims=dims, estimators="act", shots=shots, domain_shots=1, top_n=top_n,
        tokens=tokens, limit=limit, question_field=question_field, answer_field=answer_field, hook=hook, layer=layer,
        norm_scaling_factor=norm_scaling_factor, strict=strict,
        dtype=dtype, sae_dtype=sae_dtype, device=device, device_map=device_map, batch_tokens=batch_tokens,
        precision=precision, threads=threads, seed=seed, show_prompts=show_prompts,
    )  # fmt: skip
    if as_json:
        _write_json(forecasts, output, compared=len(forecasts) > 1)
        return
    for forecast in forecasts:
        print_sae(forecast, forecasts)
        print_shift(forecast, n_features=20)
    print_end(forecasts, output)


def _forecasts(
    model: str, saes: list[str], trains: dict[str, Path], output: Path, *, by_train: bool = False, **options: Any
) -> list[Forecast]:
    """Runs the forecasts of one or more training sets with one or more SAEs, and saves each in its folder.

    The folder is `output` itself, with one below it for each of several SAEs, and there for each of several training
    set if they are kept apart `by_train`.
    """
    threads, precision = options.pop("threads"), options.pop("precision")
    sae_dtype, limit = options.pop("sae_dtype"), options.pop("limit")
    estimators = [name.strip() for name in options.pop("estimators").split(",")]
    calibration_file = options.pop("calibration", None)
    calibration = calibration_file and read_calibration(calibration_file, estimators, len(saes), options)
    files.prepare_folder(output)
    set_threads(threads)
    try:
        backend.set_precision(precision)
    except ValueError as error:
        raise InputError(f"--{error}") from error
    for train in trains.values():
        if not train.exists():
            raise InputError(f"there is no training set {train}: give a file or folder with --train")
    sae_dtype = sae_dtype and str(sae_dtype)
    where = options.pop("hook"), options.pop("layer"), options.pop("norm_scaling_factor")
    loaded = load_saes(saes, *where, dtype=sae_dtype)
    with progress() as tell:
        of_saes = run_compare(
            model=model,
            sae=loaded,
            trains=trains,
            estimators=estimators,
            limit=limit or None,
            question_fields=fields("--question-field", options.pop("question_field")),
            answer_fields=fields("--answer-field", options.pop("answer_field")),
            sae_dtype=sae_dtype,
            command=typed_command(),
            progress=tell,
            say=say,
            show=show if options.pop("show_prompts") else None,
            **{name: plain_value(value) for name, value in options.items()},
        )
    names = sae_names([(sae.source, sae.hook_name) for sae in loaded])
    refused: str | None = None
    folders = [output / name if len(loaded) > 1 else output for name in names]
    clear_earlier(output, [folder / name if by_train else folder for folder in folders for name in trains])
    for of_sae, forecasts in zip(folders, of_saes, strict=True):
        for name, forecast in forecasts.items():
            folder = of_sae / name if by_train else of_sae
            if calibration is not None:
                try:
                    forecasts[name] = forecast = calibrated(forecast, calibration, calibration_file)
                except InputError as error:  # the scores are good all the same
                    refused = f"{error}; the scores without changes are in {output}"
            forecast.save(folder)
            build_report(folder)
        if by_train:
            _save_comparison(comparison(list(forecasts.values())), of_sae)
            build_comparison_report(of_sae)
    everything = [forecast for forecasts in of_saes for forecast in forecasts.values()]
    if len(loaded) > 1:
        _save_comparison(sae_comparison(everything), output)
    if refused is not None:
        raise InputError(refused)
    print_warnings(everything)
    return everything


def _save_comparison(comparison: dict[str, Any], folder: Path) -> None:
    with files.atomic_path(folder / COMPARISON_FILE) as path:
        path.write_text(files.to_json(comparison), encoding="utf-8")


def _write_json(forecasts: list[Forecast], output: Path, *, compared: bool) -> None:
    """What was written as compare.json or, for one training set and one SAE, as scores.json."""
    sys.stdout.write(
        (output / COMPARISON_FILE).read_text(encoding="utf-8") if compared else files.to_json(forecasts[0].to_dict())
    )
