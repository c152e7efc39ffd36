"""The options, each declared once, in the order in which commands show them."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sts_fast.forecast.run import ESTIMATOR_OPTIONS, SIGNED, SIZES

_SIGNED_OPTIONS = [name for name in ESTIMATOR_OPTIONS if name in SIGNED]


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
        "--estimators",
        help=f"Comma-separated, of: {', '.join(SIZES)}; with a sign, from answers: {', '.join(_SIGNED_OPTIONS)}.",
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
DeviceMapOption = Annotated[
    str | None,
    typer.Option(
        "--device-map",
        help="Spread the model: auto, balanced, balanced_low_0 or sequential (GPUs, then memory, then disk), cpu, or "
        "disk (layers stay there).",
    ),
]
BatchTokensOption = Annotated[
    int | None, typer.Option("--batch-tokens", help="Most tokens of one forward pass; default: what memory allows.")
]
PrecisionOption = Annotated[
    str | None,
    typer.Option("--precision", help="Of the SAE on CUDA: bf16, bf16x2 or fp32; default: by its weights."),
]
CalibrationOption = Annotated[
    Path | None,
    typer.Option("--calibration", help="Forecast changes, with intervals: what sts-fast validate --fit learned."),
]
ThreadsOption = Annotated[int | None, typer.Option("--threads", help="Threads of the core; default: all cores.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Of the sample of prompts and the intervals.")]
OutputOption = Annotated[Path, typer.Option("--output", help="Folder for the results.")]
ShowPromptsOption = Annotated[
    bool, typer.Option("--show-prompts", help="Print the first prompt of each set as it is sent, to standard error.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the results as JSON instead of tables.")]
