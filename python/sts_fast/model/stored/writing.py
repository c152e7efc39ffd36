"""Writes residual streams to files, one shard at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Unpack

from sts_fast import files
from sts_fast.data.examples import Example
from sts_fast.data.options import Option, part
from sts_fast.data.prompts import Progress, PromptSet, prompts_sha256
from sts_fast.data.sets import (
    Fields,
    FieldsOptions,
    Kind,
    Sampling,
    SamplingOptions,
    Sets,
    Source,
    Sources,
)
from sts_fast.errors import InputError
from sts_fast.model.language_model import LanguageModel, capture
from sts_fast.model.reader import PairedRows
from sts_fast.model.session import Purpose, Reading, Running, RunningOptions, Session
from sts_fast.model.stored.folder import Activations
from sts_fast.model.stored.index import (
    MODEL_FOLDER,
    PROMPTS_FILE,
    SETS_FOLDER,
    Index,
    Shard,
    StoredDtype,
    StoredSet,
    examples_sha256,
    is_activations,
    starts_with_bos,
    write_prompts,
)
from sts_fast.model.stored.shards import load_tensors, write_shard
from sts_fast.sae import SAE

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# A shard is written after the batch with which it reaches this many prompts; a killed run loses at most one shard.
SHARD_PROMPTS = 32


@dataclass(frozen=True)
class Capturing(Sampling, Fields, Running):
    """Options of capturing activations; see Sampling, Fields and Running too.

    train_demos, domain_demos: also with demonstrations (what dims='icl', and the estimator 'icl', read)
    activation_dtype: 'bfloat16', or 'float32' for twice the size and no rounding
    """

    train_demos: bool = True
    domain_demos: bool = True
    activation_dtype: Annotated[StoredDtype, Option("Of the files; float32 rounds nothing.")] = "bfloat16"


class CapturingOptions(SamplingOptions, FieldsOptions, RunningOptions, total=False):
    """`Capturing` as keywords."""

    train_demos: bool
    domain_demos: bool
    activation_dtype: StoredDtype
    strict: bool


def capture_activations(
    *,
    model: str | Path | PreTrainedModel,
    output: str | Path,
    trains: Mapping[str, Source],
    domains: Sources,
    demos: Sources | None = None,
    saes: Sequence[SAE] = (),
    hooks: Sequence[str] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    **options: Unpack[CapturingOptions],
) -> Activations:
    """Writes the activations that `score` and `compare` would read to a folder, which then replaces the model.

    model, domains, demos, tokenizer: as for `score`; trains: training sets by name
    output: the folder; if it contains a part of the same activations, the rest is added
    saes, hooks: the SAEs whose hooks are read, and the names of further hooks
    options: see Capturing

    Raises InputError for unusable input, and where `output` contains other activations.
    """
    capturing, output = Capturing(**options), Path(output)
    places = list(dict.fromkeys([*(sae.hook_name for sae in saes), *hooks]))
    if not places or not all(places):
        raise InputError("no place of the model was given to read: name one or more with --hook, --layer or --sae")
    sets = Sets.read(trains, domains, demos, capturing)
    for line in sets.told():
        capturing.tell_line(line)
    session = Session.open(
        model,
        saes,
        part(Reading, capturing),
        tokenizer=tokenizer,
        places=hooks,
        purpose=Purpose(needs=[("capture", "a model")]),
    )
    decoder, template = session.reader, session.template
    assert isinstance(decoder, LanguageModel)

    prompt_sets: list[PromptSet] = []
    described: list[StoredSet] = []
    kinds: tuple[tuple[Kind, dict[str, list[Example]], bool], ...] = (
        ("train", sets.trains, capturing.train_demos),
        ("domain", sets.domains, capturing.domain_demos),
    )
    for kind, of_kind, show in kinds:
        for name, examples in of_kind.items():
            own_demos = sets.demos.get(name)
            prompt_set = session.prompts(kind, name, examples, own_demos, capturing, show=show)
            described.append(
                StoredSet(
                    name=name,
                    kind=kind,
                    folder=f"{SETS_FOLDER}/{len(described)}",
                    n_prompts=len(prompt_set.prompts),
                    n_too_long=prompt_set.n_too_long,
                    n_unanswered=prompt_set.n_unanswered,
                    warnings=prompt_set.warnings,
                    shown=prompt_set.shown,
                    examples_sha256=examples_sha256(examples),
                    demos_sha256="own" if own_demos is None else examples_sha256(own_demos),
                    prompts_sha256=prompts_sha256([prompt_set]),
                    shards=[],
                )
            )
            prompt_sets.append(prompt_set)
    index = Index(
        model={
            **{"name": decoder.name, "dtype": decoder.dtype, "revision": decoder.revision},
            "weights_sha256": decoder.weights_sha256(),
        },
        hooks=decoder.hooks,
        dtype=capturing.activation_dtype,
        settings={**vars(part(Sampling, capturing)), "starts_with_bos": starts_with_bos(template)},
        sets=described,
    )
    _begin(output, index, prompt_sets, session.config, session.tokenizer)
    for stored_set, prompt_set in zip(index.sets, prompt_sets, strict=True):
        _capture_set(output, index, stored_set, prompt_set, decoder, capturing.tell)
    decoder.say_passes()
    return Activations(output, device=capturing.device, trust_remote_code=capturing.trust_remote_code)


def _begin(
    output: Path, index: Index, prompt_sets: Sequence[PromptSet], config: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Writes everything but the rows, and reuses the intact shards of an earlier run with the same settings.

    Raises InputError where the folder contains other activations, or other files.
    """
    if is_activations(output):
        before = Index.load(output)
        for stored_set, earlier in zip(index.sets, before.sets, strict=False):
            stored_set.shards = earlier.shards
        differs = [name for name, value in index.to_dict().items() if before.to_dict()[name] != value]
        if differs:
            raise InputError(
                f"{output} contains other activations (not the same {', '.join(differs)}): choose another --output, or "
                "delete it"
            )
        for stored_set in index.sets:
            stored_set.shards = list(_whole(output, stored_set.shards or []))
    else:
        for name in (MODEL_FOLDER, SETS_FOLDER):
            if (output / name).exists():
                raise InputError(f"{output} has a '{name}' that is not of activations: choose another --output")
    files.prepare_folder(output)
    index.save(output)  # first: beside an index, everything may be written again
    for stored_set, prompt_set in zip(index.sets, prompt_sets, strict=True):
        (output / stored_set.folder).mkdir(parents=True, exist_ok=True)
        write_prompts(output / stored_set.folder / PROMPTS_FILE, prompt_set.prompts)
    with files.atomic_folder(output / MODEL_FOLDER) as folder:
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _whole(folder: Path, shards: Sequence[Shard]) -> Iterator[Shard]:
    """Yields the shards before the first whose file is missing or damaged; later ones are captured again."""
    for shard in shards:
        try:
            shard.check(folder)
            load_tensors(folder / shard.file, [])
        except InputError:
            return
        yield shard


def _capture_set(
    output: Path,
    index: Index,
    stored_set: StoredSet,
    prompt_set: PromptSet,
    decoder: LanguageModel,
    progress: Progress,
) -> None:
    shards = stored_set.shards = stored_set.shards or []
    n_prompts = len(prompt_set.prompts)
    if stored_set.n_captured == n_prompts:
        return
    pending: list[list[PairedRows]] = []
    n_pending = 0
    for of_hooks in capture(decoder, prompt_set.prompts, n_done=stored_set.n_captured):
        pending.append(of_hooks)
        n_pending += len(of_hooks[0].prompts)
        if n_pending >= SHARD_PROMPTS or stored_set.n_captured + n_pending == n_prompts:
            file = f"{stored_set.folder}/{len(shards):05d}.safetensors"
            digest = write_shard(output / file, pending, index.dtype)
            shards.append(Shard(file, [int(i) for batch in pending for i in batch[0].prompts], digest))
            index.save(output)
            pending, n_pending = [], 0
            progress(prompt_set.name, stored_set.n_captured, n_prompts)
