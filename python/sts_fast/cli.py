"""The command line `sts-fast`."""

from __future__ import annotations

import platform
import shlex
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from sts_fast import __version__, _cpu, backend, cuda, files, organism, results
from sts_fast.activations import capture_activations
from sts_fast.demo import PREDICTORS, PRIMARY, SCORE, Demo, run_demo
from sts_fast.encode import encode
from sts_fast.errors import InputError
from sts_fast.hooks import PLACES, place_name, split_name
from sts_fast.report import REPORT_FILE, build_report
from sts_fast.results import ESTIMATORS, Forecast
from sts_fast.sae import SAE, load_sae
from sts_fast.sae.summary import summary
from sts_fast.score import compare as run_compare
from sts_fast.signed import SIGNED_FIELDS
from sts_fast.validate import Z_95
from sts_fast.validate import validate as run_validate

if TYPE_CHECKING:
    from sts_fast.score import Progress as Tell

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Forecast which abilities fine-tuning will move, before any training.",
)
out = Console()
err = Console(stderr=True)

BAR_WIDTH = 12

MOST_THREADS = 1024

# What typer returns after Ctrl-C: it catches KeyboardInterrupt.
INTERRUPTED = 130
# What typer raises for a wrong command line: its ClickException, which it does not export under a name of its own.
CommandLineError: type[Exception] = typer.BadParameter.__mro__[2]


class DimsChoice(StrEnum):
    icl = "icl"
    tuned = "tuned"
    active = "active"


class TokensChoice(StrEnum):
    query = "query"
    last = "last"
    answer = "answer"
    all = "all"


class ControlsChoice(StrEnum):
    features = "features"
    all = "all"


class SignedFeaturesChoice(StrEnum):
    sae = "sae"
    fired = "fired"
    raw = "raw"


class DtypeChoice(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class SaeDtypeChoice(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


StrictOption = Annotated[bool, typer.Option("--strict", help="Stop where an SAE does not seem to fit the model.")]
ModelOption = Annotated[str, typer.Option("--model", help="Model: folder or hub id; or a folder of sts-fast capture.")]
SaeOption = Annotated[
    list[str],
    typer.Option(
        "--sae",
        help="SAE: folder or file, release/id as sae-lens names it, or owner/repository:folder of the hub; repeatable: "
        "several share every forward pass.",
    ),
]
TrainOption = Annotated[Path, typer.Option("--train", help="Training set: file or folder of questions and answers.")]
DomainsOption = Annotated[
    list[str],
    typer.Option("--domains", help="name=path, a folder of files, or a file with a category column; repeatable."),
]
DemosOption = Annotated[
    list[str] | None,
    typer.Option("--demos", help="Demonstrations: name=path (train=path for the training set); repeatable."),
]
TunedOption = Annotated[str | None, typer.Option("--tuned", help="The model after training, for --dims tuned.")]
DimsOption = Annotated[DimsChoice, typer.Option("--dims", help="What the shifted features are taken from.")]
EstimatorsOption = Annotated[
    str,
    typer.Option(
        "--estimators", help="Comma-separated, of: act, icl, act_sq; with a sign, from answers: ntk, step, adapter."
    ),
]
SignedFeaturesOption = Annotated[
    SignedFeaturesChoice,
    typer.Option("--signed-features", help="What signed estimators are written in: activations, firings, residuals."),
]
ControlsOption = Annotated[
    ControlsChoice,
    typer.Option("--controls", help="features, or all: also the base model's loss and accuracy (needs answers)."),
]
LabelsOption = Annotated[Path | None, typer.Option("--labels", help="Feature labels, a Neuronpedia export.")]
ShotsOption = Annotated[int, typer.Option("--shots", help="Demonstrations of the training set.")]
DomainShotsOption = Annotated[int, typer.Option("--domain-shots", help="Demonstrations of each domain, for icl.")]
TopNOption = Annotated[int, typer.Option("--top-n", help="How many of the most shifted features are followed.")]
TokensOption = Annotated[TokensChoice, typer.Option("--tokens", help="Which tokens are read.")]
LimitOption = Annotated[int, typer.Option("--limit", help="Most prompts of a set, drawn at random; 0 for all.")]
QuestionFieldOption = Annotated[
    list[str] | None,
    typer.Option("--question-field", help="Column of the questions: FIELD, or SET=FIELD for one set; repeatable."),
]
AnswerFieldOption = Annotated[
    list[str] | None,
    typer.Option("--answer-field", help="Column of the answers: FIELD, or SET=FIELD for one set; repeatable."),
]
HookOption = Annotated[
    list[str] | None,
    typer.Option(
        "--hook",
        help="Where the SAE reads, whatever its files say: blocks.12.hook_mlp_out, or a module's path; once for all "
        "SAEs, or once for each.",
    ),
]
LayerOption = Annotated[
    list[int] | None,
    typer.Option("--layer", help="Read after this layer (or at the --hook of it), whatever the SAE says; as --hook."),
]
DoctorLayerOption = Annotated[int | None, typer.Option("--layer", help="Read after this layer.")]
ScalingOption = Annotated[
    list[float] | None,
    typer.Option("--norm-scaling-factor", help="What an SAE's input is multiplied by, if its files forgot; as --hook."),
]
DtypeOption = Annotated[DtypeChoice, typer.Option("--dtype", help="Of the model; auto is float32 on the CPU.")]
SaeDtypeOption = Annotated[SaeDtypeChoice | None, typer.Option("--sae-dtype", help="Of the SAE; default: as stored.")]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...; auto takes CUDA if present.")]
BatchTokensOption = Annotated[
    int | None, typer.Option("--batch-tokens", help="Most tokens of one forward pass; default: what memory allows.")
]
PrecisionOption = Annotated[
    str | None,
    typer.Option("--precision", help="Of the SAE on CUDA: bf16, bf16x2 or fp32; default: by its weights."),
]
ThreadsOption = Annotated[int | None, typer.Option("--threads", help="Threads of the core; default: all cores.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Of the sample of prompts and the intervals.")]
OutputOption = Annotated[Path, typer.Option("--output", help="Folder for the results.")]
ShowPromptsOption = Annotated[
    bool, typer.Option("--show-prompts", help="Print the first prompt of each set as it is sent, to standard error.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the results as JSON instead of tables.")]


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        out.print(__version__, highlight=False)
    elif context.invoked_subcommand is None:
        sys.stdout.write(context.get_help() + "\n")


@app.command()
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
    batch_tokens: BatchTokensOption = None,
    labels: LabelsOption = None,
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
        batch_tokens=batch_tokens, labels=labels, precision=precision, threads=threads,
        seed=seed, show_prompts=show_prompts,
    )  # fmt: skip
    if as_json:
        _write_json(forecasts, output, compared=len(forecasts) > 1)
        return
    for forecast in forecasts:
        _print_sae(forecast, forecasts)
        _print_shift(forecast, n_features=5)
        _print_scores(forecast)
        _print_signed(forecast)
    _print_agreement(forecasts)
    _print_end(forecasts, output)


@app.command()
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
    batch_tokens: BatchTokensOption = None,
    labels: LabelsOption = None,
    precision: PrecisionOption = None,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    show_prompts: ShowPromptsOption = False,
    output: OutputOption = Path("sts-fast-compare"),
    as_json: JsonOption = False,
) -> None:
    """Forecast several candidate training sets side by side, each domain passed through the model once."""
    trains = _named_trains(train)
    forecasts = _forecasts(
        model, sae, trains, output, by_train=True,
        domains=domains, demos=demos, dims=dims, estimators=estimators,
        signed_features=signed_features, controls=controls, shots=shots,
        domain_shots=domain_shots, top_n=top_n, tokens=tokens, limit=limit, question_field=question_field,
        answer_field=answer_field, hook=hook, layer=layer,
        norm_scaling_factor=norm_scaling_factor, strict=strict, dtype=dtype, sae_dtype=sae_dtype, device=device,
        batch_tokens=batch_tokens, labels=labels, precision=precision, threads=threads,
        seed=seed, show_prompts=show_prompts,
    )  # fmt: skip
    if as_json:
        _write_json(forecasts, output, compared=True)
        return
    for of_sae in _by_sae(forecasts):
        _print_sae(of_sae[0], forecasts)
        _print_comparison(results.comparison(of_sae))
    _print_agreement(forecasts)
    _print_end(forecasts, output)


@app.command()
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
        dtype=dtype, sae_dtype=sae_dtype, device=device, batch_tokens=batch_tokens, precision=precision,
        threads=threads, seed=seed, show_prompts=show_prompts,
    )  # fmt: skip
    if as_json:
        _write_json(forecasts, output, compared=len(forecasts) > 1)
        return
    for forecast in forecasts:
        _print_sae(forecast, forecasts)
        _print_shift(forecast, n_features=20)
    _print_end(forecasts, output)


@app.command()
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
    batch_tokens: BatchTokensOption = None,
    seed: SeedOption = 0,
) -> None:
    """Write what a forecast reads of a model to files, for other SAEs and settings without the model."""
    if dims == DimsChoice.tuned:
        raise InputError("--dims tuned needs the model after training, whose activations are not captured")
    trains = {"train": Path(train[0])} if len(train) == 1 and Path(train[0]).exists() else _named_trains(train)
    for path in trains.values():
        if not path.exists():
            raise InputError(f"there is no training set {path}: give a file or folder with --train")
    saes = _load_saes(sae, None, None, None, dtype=None) if sae else []
    with _progress() as tell:
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
            batch_tokens=batch_tokens,
            question_fields=_fields("--question-field", question_field),
            answer_fields=_fields("--answer-field", answer_field),
            progress=tell,
            say=_say,
        )
    err.print(
        f"{output} holds {captured.summary()}: give it as --model to shift, score or compare",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip


@app.command()
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


@app.command()
def report(run: Annotated[Path, typer.Argument(help="Folder that sts-fast score wrote.")]) -> None:
    """Write report.html of a run again, with the outcome if it has been validated."""
    out.print(str(build_report(run)), highlight=False, markup=False)


@app.command()
def demo(
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Fine-tunings on each training set.")] = 1,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the first fine-tuning, and of --retrain.")] = 0,
    heavy: Annotated[bool, typer.Option("--heavy", help="Train five times as long at a higher rate.")] = False,
    retrain: Annotated[bool, typer.Option("--retrain", help="Make the model and SAE again first: minutes.")] = False,
    output: OutputOption = Path("sts-fast-demo"),
    as_json: JsonOption = False,
) -> None:
    """Forecast, really fine-tune and compare, on a small model that comes with the package."""
    results.prepare_folder(output)
    folder = output / "organism" if retrain else None
    with _progress("steps") as tell:
        if folder is not None:
            organism.train(seed, folder, tell)
        result = run_demo(n_seeds=seeds, seed=seed, heavy=heavy, folder=folder, progress=tell)
    result.save(output)
    if as_json:
        sys.stdout.write(results.to_json(result.to_dict()))
    else:
        _print_demo(result)
    err.print(f"Open {output / REPORT_FILE}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def doctor(
    sae: Annotated[str | None, typer.Option("--sae", help="Also read this SAE and say what was understood.")] = None,
    layer: DoctorLayerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what is installed, which backend computes, what was understood of an SAE, and check the core."""
    facts: dict[str, Any] = {
        "sts-fast": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("numpy", "torch", "transformers", "safetensors", "pyarrow", "sae-lens")},
        "CPU core": f"{_cpu.instruction_set()}, {_cpu.get_num_threads()} threads",
        "CUDA core": cuda.missing_reason() or "ready",
        "self-check": _self_check(),
    }
    if sae is not None:
        facts |= summary(load_sae(sae, layer=layer))
    if as_json:
        import json

        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
        return
    table = Table(show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(f"[bold]{name}[/bold]", escape(str(value)))
    out.print(table)
    if not facts["self-check"].startswith("ok"):
        raise InputError("the core fails its self-check on this machine: please report it with what is printed above")


def main() -> None:
    """Entry point: exit code 0, or 2 with one line `error: ...` on standard error."""
    try:
        if app(prog_name="sts-fast", standalone_mode=False) == INTERRUPTED:
            raise KeyboardInterrupt
    except (InputError, OSError) as error:  # OSError: names that are too long, folders that may not be listed
        _fail(str(error))
    except CommandLineError as error:
        _fail(f"{error.format_message()} See sts-fast --help")  # type: ignore[attr-defined]
    except (typer.Abort, KeyboardInterrupt):
        _fail("interrupted: no result was written")
    except (MemoryError, RuntimeError) as error:  # torch has no class of its own for memory that ran out on the CPU
        if not (isinstance(error, MemoryError) or "memory" in str(error)):
            raise
        _fail("out of memory: lower --batch-tokens, or take --dtype bfloat16")


def _fail(message: str) -> None:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    sys.exit(2)


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
    results.prepare_folder(output)
    if threads is not None:
        if not 1 <= threads <= MOST_THREADS:
            raise InputError(f"--threads must lie between 1 and {MOST_THREADS}, not {threads}")
        _cpu.set_num_threads(threads)
    try:
        backend.set_precision(precision)
    except ValueError as error:
        raise InputError(f"--{error}") from error
    for train in trains.values():
        if not train.exists():
            raise InputError(f"there is no training set {train}: give a file or folder with --train")
    sae_dtype = sae_dtype and str(sae_dtype)
    where = options.pop("hook"), options.pop("layer"), options.pop("norm_scaling_factor")
    loaded = _load_saes(saes, *where, dtype=sae_dtype)
    with _progress() as tell:
        of_saes = run_compare(
            model=model,
            sae=loaded,
            trains=trains,
            estimators=estimators,
            limit=limit or None,
            question_fields=_fields("--question-field", options.pop("question_field")),
            answer_fields=_fields("--answer-field", options.pop("answer_field")),
            sae_dtype=sae_dtype,
            command=_command(),
            progress=tell,
            say=_say,
            show=_show if options.pop("show_prompts") else None,
            **{name: _plain_value(value) for name, value in options.items()},
        )
    names = results.sae_names([(sae.source, sae.hook_name) for sae in loaded])
    for sae_name, forecasts in zip(names, of_saes, strict=True):
        of_sae = output / sae_name if len(loaded) > 1 else output
        for name, forecast in forecasts.items():
            folder = of_sae / name if by_train else of_sae
            forecast.save(folder)
            build_report(folder)
        if by_train:
            _save_comparison(results.comparison(list(forecasts.values())), of_sae)
    everything = [forecast for forecasts in of_saes for forecast in forecasts.values()]
    if len(loaded) > 1:
        _save_comparison(results.sae_comparison(everything), output)
    return everything


def _load_saes(
    sources: list[str],
    hooks: list[str] | None,
    layers: list[int] | None,
    factors: list[float] | None,
    *,
    dtype: str | None,
) -> list[SAE]:
    """The SAEs, with what the command line says of each: an option is given once for all of them, or once for each."""

    def for_each(option: str, values: list[Any] | None) -> list[Any]:
        if len(values or [None]) not in (1, len(sources)):
            raise InputError(f"{option} is given {len(values or [])} times for {len(sources)} SAEs: once, or once each")
        return list(values or [None]) * (len(sources) if len(values or [None]) == 1 else 1)

    chosen = (for_each("--hook", hooks), for_each("--layer", layers), for_each("--norm-scaling-factor", factors))
    loaded = []
    for source, hook, layer, factor in zip(sources, *chosen, strict=True):
        both = hook is not None and layer is not None
        if both and split_name(hook)[1] is not None:
            raise InputError(
                f"--layer and --hook say the same thing: give one of them, or --hook as {', '.join(PLACES)}"
            )
        if layer is not None and layer < 0:
            raise InputError(f"--layer counts from 0, and is not {layer}")
        if hook is not None and layer is None and hook.removeprefix("hook_") in (*PLACES, "z"):
            raise InputError(f"--hook {hook} is a place of every layer: say of which, with --layer")
        where = {"hook": place_name(hook, layer)} if both else {"hook": hook, "layer": layer}
        loaded.append(load_sae(source, norm_scaling_factor=factor, dtype=dtype, **where))
    return loaded


def _save_comparison(comparison: dict[str, Any], folder: Path) -> None:
    with files.atomic_path(folder / results.COMPARISON_FILE) as path:
        path.write_text(results.to_json(comparison), encoding="utf-8")


def _write_json(forecasts: list[Forecast], output: Path, *, compared: bool) -> None:
    """What was written as compare.json or, for one training set and one SAE, as scores.json."""
    sys.stdout.write(
        (output / results.COMPARISON_FILE).read_text(encoding="utf-8")
        if compared
        else results.to_json(forecasts[0].to_dict())
    )


def _by_sae(forecasts: list[Forecast]) -> list[list[Forecast]]:
    """Forecasts in groups of one SAE: they stand in that order."""
    names = list(dict.fromkeys(forecast.train["name"] for forecast in forecasts))
    return [forecasts[i : i + len(names)] for i in range(0, len(forecasts), len(names))]


def _named_trains(values: list[str]) -> dict[str, Path]:
    trains: dict[str, Path] = {}
    for value in values:
        name, equals, rest = value.partition("=")
        path = Path(rest if equals and not Path(value).exists() else value)
        name = name if str(path) == rest and equals else path.name.partition(".")[0]
        if name in ("", ".", "..", *trains) or "/" in name:
            raise InputError(f"--train {value} needs a name of its own: write it as name=path")
        trains[name] = path
    return trains


def _show(text: str) -> None:
    sys.stderr.write(text + "\n")


def _say(line: str) -> None:
    warns = line.startswith("warning: ")
    if warns or err.is_terminal:  # like the progress: a log holds results, warnings and errors alone
        err.print(line, style="yellow" if warns else "dim", highlight=False, markup=False, soft_wrap=True)


def _plain_value(value: Any) -> Any:
    return str(value) if isinstance(value, StrEnum) else value


def _command() -> str:
    """The command as typed, less the options that change where results go and how fast, but not what they are."""
    kept: list[str] = []
    words = iter(sys.argv[1:])
    for word in words:
        if word in ("--output", "--threads"):
            next(words, None)
        elif not word.startswith(("--output=", "--threads=")) and word != "--json":
            kept.append(word)
    return shlex.join(["sts-fast", *kept])


def _fields(option: str, values: list[str] | None) -> dict[str, str]:
    fields = {}
    for value in values or []:
        name, equals, field = value.rpartition("=")
        if not field or (equals and not name):
            raise InputError(f"{option} takes FIELD or SET=FIELD, not '{value}'")
        fields[name] = field
    return fields


@contextmanager
def _progress(unit: str = "prompts") -> Iterator[Tell]:
    if not err.is_terminal:
        yield lambda stage, done, total: None
        return
    columns = (
        SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
        TextColumn(unit), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=err, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def tell(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)

        yield tell


def _print_shift(forecast: Forecast, n_features: int) -> None:
    top_n, shift = forecast.settings["top_n"], forecast.shift
    table = Table(title=f"Most shifted of {forecast.sae['d_sae']:,} features", title_justify="left")
    table.add_column("feature", justify="right")
    table.add_column("share of shift", justify="right")
    table.add_column("mean activation", justify="right")
    for feature in forecast.shifted_features[:n_features]:
        table.add_row(str(feature.index), f"{feature.share:.1%}", f"{feature.mean_activation:.4g}")
    out.print(table)
    low, high = shift["stability"]["overlap_ci"]
    out.print(
        f"The top {top_n} hold {shift['share_of_top_n']:.0%} of the shift; resampling the "
        f"{forecast.train['n_prompts']} training prompts keeps {shift['stability']['mean_overlap']:.0%} of them "
        f"({low:.0%} to {high:.0%}).\n"
    )


def _print_sae(forecast: Forecast, forecasts: list[Forecast]) -> None:
    """Which SAE the tables below are of, where there are several."""
    if len(_by_sae(forecasts)) > 1:
        text = f"{forecast.sae['source']}, read at {forecast.sae['hook_name']}"
        out.print(text, style="bold", highlight=False, markup=False, soft_wrap=True)


def _print_agreement(forecasts: list[Forecast]) -> None:
    """How alike several SAEs rank the domains."""
    if len(_by_sae(forecasts)) == 1:
        return
    comparison = results.sae_comparison(forecasts)
    names = [sae["name"] for sae in comparison["saes"]]
    for estimator, of_trains in comparison["rank_correlation"].items():
        for train, matrix in of_trains.items():
            title = f"Rank correlation of {estimator.replace('sts', 'STS')} over domains, trained on {train}"
            table = Table(title=title, title_justify="left")
            table.add_column("SAE")
            for name in names:
                table.add_column(escape(name), justify="right")
            for name, row in zip(names, matrix, strict=True):
                table.add_row(escape(name), *("" if value is None else f"{value:.2f}" for value in row))
            out.print(table)


def _print_scores(forecast: Forecast) -> None:
    for estimator in (name for name in ESTIMATORS if name in forecast.settings["estimators"]):
        rows = sorted(
            (
                (getattr(domain, f"sts_{estimator}"), getattr(domain, f"sts_{estimator}_ci"), domain)
                for domain in forecast.domains
            ),
            key=lambda row: -row[0],
        )
        longest = max(value for value, _, _ in rows) or 1.0
        table = Table(title=f"Forecast size of change, by STS_{estimator}", title_justify="left", width=79)
        table.add_column("domain", ratio=1)
        table.add_column("", width=BAR_WIDTH)
        table.add_column("score [95%]", justify="right", no_wrap=True)
        table.add_column("random", justify="right", no_wrap=True)
        table.add_column("prompts", justify="right", no_wrap=True)
        for value, (low, high), domain in rows:
            table.add_row(
                escape(domain.name),
                "█" * round(BAR_WIDTH * value / longest),
                f"{value:.3g} [{low:.3g}, {high:.3g}]",
                f"{domain.controls['random'][f'sts_{estimator}']:.3g}",
                str(domain.n_prompts),
            )
        out.print(table)
    if skipped := [f"{domain.n_skipped} of {domain.name}" for domain in forecast.domains if domain.n_skipped]:
        out.print(
            f"Left out, too long for the context or without an answer: {', '.join(skipped)}.",
            highlight=False,
            markup=False,
        )
    out.print(
        "A score says how much a domain is expected to move, not whether for better or worse.\n"
        "Compare domains with each other, and each score with that of random features beside it."
    )


def _print_signed(forecast: Forecast) -> None:
    if forecast.signed is None:
        return
    domains = forecast.signed["domains"]
    for estimator in (name for name in SIGNED_FIELDS if next(iter(domains.values()))[name] is not None):
        of = "fall of the loss" if estimator.endswith("_loss") else "change of P(answer)"
        table = Table(title=f"Forecast {of}, by {estimator}", title_justify="left", width=79)
        table.add_column("domain", ratio=1)
        for column in ("worse", "better"):
            table.add_column(column, width=BAR_WIDTH, justify="right" if column == "worse" else "left")
        table.add_column("forecast [95%]", justify="right", no_wrap=True)
        largest = max(abs(found[estimator]["value"]) for found in domains.values()) or 1.0
        for name, found in sorted(domains.items(), key=lambda item: -item[1][estimator]["value"]):
            value, (low, high) = found[estimator]["value"], found[estimator]["ci"]
            bar = "█" * round(BAR_WIDTH * abs(value) / largest)
            sides = (bar, "") if value < 0 else ("", bar)
            table.add_row(escape(name), *sides, f"{value:+.3g} [{low:+.3g}, {high:+.3g}]")
        out.print(table)


def _print_comparison(comparison: dict[str, Any]) -> None:
    names = [train["name"] for train in comparison["trains"]]
    for estimator, scores in comparison["scores"].items():
        table = Table(title=f"Forecast size of change, by {estimator.replace('sts', 'STS')}", title_justify="left")
        table.add_column("domain")
        for name in names:
            table.add_column(escape(name), justify="right")
        for i, domain in enumerate(comparison["domains"]):
            cells = [(scores[name]["value"][i], *scores[name]["ci"][i]) for name in names]
            table.add_row(escape(domain), *(f"{value:.3g} [{low:.3g}, {high:.3g}]" for value, low, high in cells))
        out.print(table)
    out.print(
        "Read down a column to see what a training set moves most; scores of one domain may be compared along its row "
        "where the training sets shift the same kind of features. Scores say how much, not for better or worse.",
        highlight=False,
    )


def _print_demo(demo: Demo) -> None:
    trial = demo.trials[0]
    rows = sorted(trial.validation.domains, key=lambda row: -row.score)
    table = Table(title=f"Trained on {trial.train}: forecast, made before, and outcome", title_justify="left", width=79)
    for name in ("domain", f"{SCORE} [95%]", "change of P(correct) ± 95%"):
        table.add_column(name, justify="left" if name == "domain" else "right", no_wrap=True)
    for row in (*rows[:7], None, *rows[-3:]):
        if row is None:
            table.add_row(f"... {len(rows) - 10} more", "...", "...")
            continue
        low, high = row.score_ci or (row.score, row.score)
        noise = "" if row.outcome.stderr is None else f" ± {Z_95 * row.outcome.stderr:.3f}"
        table.add_row(row.name, f"{row.score:.3g} [{low:.3g}, {high:.3g}]", f"{row.outcome.change:+.3f}{noise}")
    out.print(table)
    table = Table(title=f"Correlation with {PRIMARY}, over domains", title_justify="left", width=79)
    for name in ("number", "mean r", "lowest", "highest", "above zero"):
        table.add_column(name, justify="left" if name == "number" else "right", no_wrap=True)
    for predictor in PREDICTORS:
        spread = demo.spread(PRIMARY, predictor)
        cells = (f"{value:.2f}" for value in (spread.mean, spread.low, spread.high))
        table.add_row(predictor, *cells, f"{spread.n_above_zero} of {spread.n}")
    out.print(table)
    table = Table(title=f"{SCORE} in each training", title_justify="left", width=79)
    for name in ("trained on", "own change", "r [95%]", "domains moved"):
        table.add_column(name, justify="left" if name == "trained on" else "right", no_wrap=True)
    for trial in demo.trials:
        pearson, limits = trial.validation.size.pearson, trial.validation.limits
        name = trial.train if len(demo.trials) == len(demo.forecasts) else f"{trial.train}, seed {trial.seed}"
        interval = "" if pearson.ci_domains is None else " [{:.2f}, {:.2f}]".format(*pearson.ci_domains)
        moved = f"{limits.n_distinguishable} of {len(trial.validation.domains)}"
        table.add_row(name, f"{trial.own_change:+.2f}", f"{pearson.value:.2f}{interval}", moved)
    out.print(table)
    for finding in demo.findings():
        out.print("\n".join(textwrap.wrap(finding, 77, initial_indent="- ", subsequent_indent="  ")), highlight=False)


def _print_end(forecasts: list[Forecast], output: Path) -> None:
    told = {forecast.sae["fit"][key] for forecast in forecasts for key in ("warning", "names")}
    for warning in dict.fromkeys(warning for forecast in forecasts for warning in forecast.warnings):
        if warning in told:
            continue
        err.print(f"warning: {warning}", style="yellow", highlight=False, markup=False)
    err.print(f"Results are in {output}", highlight=False, markup=False, soft_wrap=True)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _self_check() -> str:
    """Encodes random activations and compares with the equation in float64."""
    rng = np.random.default_rng(0)
    W_enc, b_enc = rng.normal(size=(48, 200)).astype(np.float32), rng.normal(size=200).astype(np.float32)
    acts = rng.normal(size=(33, 48)).astype(np.float32)
    sae = SAE(architecture="standard", W_enc=W_enc, b_enc=b_enc, b_dec=np.zeros(48, np.float32))
    features = encode(sae, acts)
    dense = np.zeros((33, 200))
    dense[np.repeat(np.arange(33), np.diff(features.indptr)), features.indices] = features.values
    expected = np.maximum(acts.astype(np.float64) @ W_enc.astype(np.float64) + b_enc, 0)
    difference = float(np.abs(dense - expected).max() / expected.max())
    return f"{'ok' if difference < 1e-5 else 'FAILED'} (largest relative difference from float64 {difference:.1e})"
