"""sts-fast capture."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from sts_fast.cli.arguments import named_trains
from sts_fast.cli.console import note, progress, say
from sts_fast.cli.options import Demos
from sts_fast.cli.output import completed
from sts_fast.data.options import Option
from sts_fast.data.sources import named_place
from sts_fast.errors import InputError, listed
from sts_fast.files import prepare_folder
from sts_fast.forecast.options import Dims
from sts_fast.model.stored.exported import REQUESTS_FILE
from sts_fast.model.stored.writing import Capturing, capture_activations, export_requests
from sts_fast.places import place_name
from sts_fast.sae import load_sae


@dataclass(frozen=True)
class Sources:
    """The model that is read, the sets that are sent, and the places."""

    model: Annotated[str, Option("Model: folder or hub id.")]
    train: Annotated[list[str], Option("A training set: path, or name=path; repeatable, one name too.")]
    output: Annotated[Path, Option("Folder for the activations; an incomplete one is completed.")]
    sae: Annotated[list[str] | None, Option("Read where this SAE reads; repeatable.")] = None
    hook: Annotated[list[str] | None, Option("A place to read: blocks.12.hook_mlp_out, or a module's path.")] = None
    layer: Annotated[list[int] | None, Option("Read after this layer; repeatable.")] = None
    domains: Annotated[list[str] | None, Option("As for score; repeatable.")] = None
    demos: Demos = None
    prompts_only: Annotated[
        bool, Option(f"Write only the prompts, as OUTPUT/{REQUESTS_FILE}, for an inference server; run no model.")
    ] = False


@dataclass(frozen=True)
class Demonstrated:
    """Settings of the forecast to come; sets that it reads with demonstrations are captured with them too."""

    dims: Annotated[Dims, Option("Of the forecast; active: training sets only without demonstrations.")] = "icl"
    estimators: Annotated[str, Option("Of the forecast; without icl: domains only without demonstrations.")] = "act,icl"


def capture(sources: Sources, demonstrated: Demonstrated, capturing: Capturing) -> None:
    """Write the activations that a forecast reads to files, for other SAEs and settings without the model."""
    if demonstrated.dims == "tuned":
        raise InputError("--dims tuned needs the model after training, whose activations are not captured")
    if sources.prompts_only and capturing.export is not None:
        raise InputError("--prompts-only comes before --from-export: give one of them")
    trains = named_trains(sources.train)
    if len(trains) == 1 and named_place(sources.train[0])[0] is None:
        trains = {"train": sources.train}
    with completed(sources.output), progress() as tell:
        capturing = replace(
            capturing,
            train_demos=demonstrated.dims == "icl",
            domain_demos="icl" in [name.strip() for name in demonstrated.estimators.split(",")],
            progress=tell,
            say=say,
        )
        given = {
            "model": sources.model,
            "trains": trains,
            "domains": sources.domains or [],
            "demos": sources.demos,
            "saes": [load_sae(source) for source in sources.sae or []],
            "hooks": [*(sources.hook or []), *(place_name("resid_post", layer) for layer in sources.layer or [])],
            **vars(capturing),
        }
        if sources.prompts_only:
            requests, path = export_requests(**given), sources.output / REQUESTS_FILE
            prepare_folder(sources.output)
            requests.save(path)
            told = f"{path} contains {requests.summary()}: have layers {listed(requests.layers)} exported, and give "
            told += "the folder with --from-export"
        else:
            captured = capture_activations(output=sources.output, **given)
            told = f"{sources.output} contains {captured.summary()}: give it as --model to shift, score or compare"
    note(told)
