"""Writes residual streams to files, one shard at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sts_fast import files
from sts_fast.data.examples import Example
from sts_fast.data.prompts import Progress, PromptSet, TokenClass, prompts_sha256
from sts_fast.data.sets import Fields, Kind, Sampling, Sets, Source, check_enough
from sts_fast.errors import InputError
from sts_fast.model.language_model import LanguageModel, capture
from sts_fast.model.reader import PairedRows
from sts_fast.model.session import Reading, Session
from sts_fast.model.stored.folder import Activations
from sts_fast.model.stored.index import (
    MODEL_FOLDER,
    PROMPTS_FILE,
    SETS_FOLDER,
    STORED_DTYPES,
    Index,
    Shard,
    StoredSet,
    examples_sha256,
    is_activations,
    starts_with_bos,
    write_prompts,
)
from sts_fast.model.stored.shards import load_tensors, write_shard
from sts_fast.model.weights import DeviceMap
from sts_fast.sae import SAE

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# A shard is written after the batch with which it reaches this many prompts; a killed run loses at most one shard.
SHARD_PROMPTS = 32


def capture_activations(
    *,
    model: str | Path | PreTrainedModel,
    output: str | Path,
    trains: Mapping[str, Source],
    domains: Mapping[str, Source] | Sequence[str],
    demos: Mapping[str, Source] | Sequence[str] | None = None,
    saes: Sequence[SAE] = (),
    hooks: Sequence[str] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    train_demos: bool = True,
    domain_demos: bool = True,
    shots: int = 2,
    domain_shots: int = 5,
    tokens: TokenClass = "query",
    limit: int | None = 256,
    seed: int = 0,
    dtype: str = "auto",
    activation_dtype: str = "bfloat16",
    device: str = "auto",
    device_map: DeviceMap | None = None,
    batch_tokens: int | None = None,
    question_fields: Mapping[str, str] | None = None,
    answer_fields: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> Activations:
    """Writes the activations that `score` and `compare` would read to a folder, which then replaces the model.

    model, domains, demos, tokenizer, shots, ..., batch_tokens: as for `score`
    trains: training sets by name
    output: the folder; if it contains a part of the same activations, the rest is added
    saes, hooks: the SAEs whose hooks are read, and the names of further hooks
    train_demos, domain_demos: read the sets also with demonstrations, for dims='icl' and the estimator 'icl'
    activation_dtype: 'bfloat16', or 'float32' for twice the size and no rounding

    Raises InputError for unusable input, and where `output` contains other activations.
    """
    if activation_dtype not in STORED_DTYPES:
        raise InputError(f"--activation-dtype must be one of {', '.join(STORED_DTYPES)}, not '{activation_dtype}'")
    output = Path(output)
    places = list(dict.fromkeys([*(sae.hook_name for sae in saes), *hooks]))
    if not places or not all(places):
        raise InputError("no place of the model was given to read: name one or more with --hook, --layer or --sae")
    sets = Sets.read(trains, domains, demos, Fields(question_fields or {}, answer_fields or {}))
    session = Session.open(
        model,
        saes,
        Reading(dtype=dtype, device=device, device_map=device_map, batch_tokens=batch_tokens, say=say),
        tokenizer=tokenizer,
        places=hooks,
        needs=[("capture", "a model")],
    )
    decoder, template = session.reader, session.template
    assert isinstance(decoder, LanguageModel)

    sampling = Sampling(shots, domain_shots, tokens, limit, seed)
    prompt_sets: list[PromptSet] = []
    described: list[StoredSet] = []
    kinds: tuple[tuple[Kind, dict[str, list[Example]], bool], ...] = (
        ("train", sets.trains, train_demos),
        ("domain", sets.domains, domain_demos),
    )
    for kind, of_kind, show in kinds:
        for name, examples in of_kind.items():
            own_demos = sets.demos.get(name)
            prompt_set = session.prompts(kind, name, examples, own_demos, sampling, show=show)
            check_enough(prompt_set, session.context_length, kind)
            described.append(
                StoredSet(
                    name=name,
                    kind=kind,
                    folder=f"{SETS_FOLDER}/{len(described)}",
                    n_prompts=len(prompt_set.prompts),
                    n_too_long=prompt_set.n_too_long,
                    n_unanswered=prompt_set.n_unanswered,
                    warnings=prompt_set.warnings,
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
        dtype=activation_dtype,
        settings={**asdict(sampling), "starts_with_bos": starts_with_bos(template)},
        sets=described,
    )
    _begin(output, index, prompt_sets, session.config, session.tokenizer)
    for stored_set, prompt_set in zip(index.sets, prompt_sets, strict=True):
        _capture_set(output, index, stored_set, prompt_set, decoder, progress or (lambda stage, done, total: None))
    decoder.say_passes()
    return Activations(output, device=device)


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
