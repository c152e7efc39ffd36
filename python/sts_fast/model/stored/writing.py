"""Writes residual streams to files, one shard at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Unpack

from sts_fast import files
from sts_fast.data.examples import Example
from sts_fast.data.options import Option, part, shows
from sts_fast.data.progress import n_sent, with_whole
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
from sts_fast.model.hooks import find_hooks
from sts_fast.model.language_model import LanguageModel, capture
from sts_fast.model.lengths import ANY_LENGTH, length_rule
from sts_fast.model.reader import PairedRows
from sts_fast.model.session import Purpose, Reading, Running, RunningOptions, Session
from sts_fast.model.stored.exported import EMBEDDING, Export, Request, Requests, layer_number
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
from sts_fast.places import layer_of
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
    export:       folder of hidden states that vLLM wrote of the requests of `export_requests`; no model is run then
    export_layers: its layers as vLLM numbers them, ascending; None: those that `export_requests` asks for
    """

    train_demos: bool = True
    domain_demos: bool = True
    activation_dtype: Annotated[StoredDtype, Option("Of the files; float32 rounds nothing.")] = "bfloat16"
    export: Annotated[
        str | Path | None,
        Option(
            "Read the hidden states that vLLM wrote to this folder, of the requests of --prompts-only, and run no "
            "model.",
            "--from-export",
        ),
    ] = None
    export_layers: Annotated[
        list[int] | None,
        Option(
            "A layer in the export, as vLLM numbers it (0: the embedding); repeatable; default: those that "
            "--prompts-only asks for.",
            "--export-layer",
        ),
    ] = None


class CapturingOptions(SamplingOptions, FieldsOptions, RunningOptions, total=False):
    """`Capturing` as keywords."""

    train_demos: bool
    domain_demos: bool
    activation_dtype: StoredDtype
    export: str | Path | None
    export_layers: list[int] | None
    strict: bool


@shows(Capturing, CapturingOptions)
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

    Raises InputError for unusable input, where `output` contains other activations, and where an export is not whole or
    not of these prompts.
    """
    capturing, output = Capturing(**options), Path(output)
    plan = _Plan.make(
        capturing, model=model, trains=trains, domains=domains, demos=demos, saes=saes, hooks=hooks, tokenizer=tokenizer
    )
    session = plan.session
    source = plan.decoder() if capturing.export is None else plan.export()
    index = Index(
        model={
            **{"name": session.name, "dtype": source.dtype},
            "revision": getattr(session.config, "_commit_hash", None),
            "weights_sha256": source.weights_sha256(),
        },
        hooks=source.hooks,
        dtype=capturing.activation_dtype,
        settings={**vars(part(Sampling, capturing)), "starts_with_bos": starts_with_bos(session.template)},
        sets=plan.sets,
    )
    # No part is kept of an export: it may have been of another one, and to read the files again is cheap.
    _begin(output, index, plan.prompt_sets, session, resume=capturing.export is None)
    stages = {prompt_set.name: n_sent([prompt_set]) for prompt_set in plan.prompt_sets}
    capturing = replace(capturing, progress=with_whole(capturing.progress, stages))
    for stored_set, prompt_set in zip(index.sets, plan.prompt_sets, strict=True):
        prompts = prompt_set.prompts
        if isinstance(source, Export):
            batches = source.rows(prompts)
        else:
            batches = capture(source, prompts, n_done=stored_set.n_captured)
        _write_set(output, index, stored_set, len(prompts), batches, capturing.tell)
    if isinstance(source, LanguageModel):
        source.say_passes()
    return Activations(output, device=capturing.device, trust_remote_code=capturing.trust_remote_code)


@shows(Capturing, CapturingOptions)
def export_requests(
    *,
    model: str | Path | PreTrainedModel,
    trains: Mapping[str, Source],
    domains: Sources,
    demos: Sources | None = None,
    saes: Sequence[SAE] = (),
    hooks: Sequence[str] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    **options: Unpack[CapturingOptions],
) -> Requests:
    """The requests to an inference server whose hidden states `capture_activations` reads with `export`.

    The arguments are those of `capture_activations`. Of the model only the config and the tokenizer are read.
    Raises InputError for unusable input, and for hooks that inference servers do not export.
    """
    plan = _Plan.make(
        Capturing(**options), model=model, trains=trains, domains=domains, demos=demos, saes=saes, hooks=hooks,
        tokenizer=tokenizer,
    )  # fmt: skip
    return plan.requests()


@dataclass(frozen=True)
class _Plan:
    """The places that are captured, and the prompts of each set."""

    capturing: Capturing
    session: Session
    places: list[str]
    sets: list[StoredSet]
    prompt_sets: list[PromptSet]

    @classmethod
    def make(
        cls,
        capturing: Capturing,
        *,
        model: str | Path | PreTrainedModel,
        trains: Mapping[str, Source],
        domains: Sources,
        demos: Sources | None,
        saes: Sequence[SAE],
        hooks: Sequence[str],
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> _Plan:
        places = list(dict.fromkeys([*(sae.hook_name for sae in saes), *hooks]))
        if not places or not all(places):
            raise InputError("no place of the model was given to read: name one or more with --hook, --layer or --sae")
        if capturing.export is None and capturing.export_layers:
            raise InputError("--export-layer is of no use without --from-export: give both")
        sets = Sets.read(trains, domains, demos, capturing)
        for line in sets.told():
            capturing.tell_line(line)
        purpose = Purpose(run=False, needs=[("capture", "a model")])
        session = Session.open(
            model, saes, part(Reading, capturing), tokenizer=tokenizer, places=hooks, purpose=purpose
        )
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
        return cls(capturing, session, places, described, prompt_sets)

    def decoder(self) -> LanguageModel:
        reader = self.session.reader
        assert isinstance(reader, LanguageModel)
        return reader

    def requests(self) -> Requests:
        n_layers = self.session.config.get_text_config().num_hidden_layers
        for place in self.places:
            layer_of(place, n_layers, name=self.session.name)
        layers = sorted({EMBEDDING, *map(layer_number, self.places)})
        kinds = [stored_set.kind for stored_set in self.sets]
        return Requests(Request.of(zip(kinds, self.prompt_sets, strict=True)), layers)

    def export(self) -> Export:
        """The export, checked against the requests; tells what is worth knowing of it."""
        requests, session, capturing = self.requests(), self.session, self.capturing
        folder = Path(capturing.export or "")
        hooks = find_hooks(session.outline, self.places, name=session.name)
        export = Export(folder, hooks, requests.requests, capturing.export_layers or requests.layers)
        capturing.tell_line(f"{folder} has the {requests.summary()} in {export.dtype}")
        lengths = length_rule(session.config.get_text_config())
        if lengths != ANY_LENGTH:
            longest = min([*lengths.switches, *filter(None, [lengths.each_above])])
            session.reading.warn(
                f"what {session.name} computes depends on the prompt's length, for which inference servers take "
                f"--max-model-len: give them at most {longest}"
            )
        return export


def _begin(output: Path, index: Index, prompt_sets: Sequence[PromptSet], session: Session, *, resume: bool) -> None:
    """Writes everything but the rows; resume: reuses the intact shards of an earlier run with the same settings.

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
            stored_set.shards = list(_whole(output, stored_set.shards or [])) if resume else []
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
        session.config.save_pretrained(folder)
        try:
            session.tokenizer.save_pretrained(folder)
        except Exception as error:  # of tokenizers, whose errors have no class of their own
            if "os error" not in str(error):
                raise
            raise OSError(str(error)) from error


def _whole(folder: Path, shards: Sequence[Shard]) -> Iterator[Shard]:
    """Yields the shards before the first whose file is missing or damaged; later ones are captured again."""
    for shard in shards:
        try:
            shard.check(folder)
            load_tensors(folder / shard.file, [])
        except InputError:
            return
        yield shard


def _write_set(
    output: Path,
    index: Index,
    stored_set: StoredSet,
    n_prompts: int,
    batches: Iterable[list[PairedRows]],
    progress: Progress,
) -> None:
    """Writes the batches of a set that follow those of its shards."""
    shards = stored_set.shards = stored_set.shards or []
    if stored_set.n_captured == n_prompts:
        return
    pending: list[list[PairedRows]] = []
    n_pending = 0
    for of_hooks in batches:
        pending.append(of_hooks)
        n_pending += len(of_hooks[0].prompts)
        if n_pending >= SHARD_PROMPTS or stored_set.n_captured + n_pending == n_prompts:
            file = f"{stored_set.folder}/{len(shards):05d}.safetensors"
            digest = write_shard(output / file, pending, index.dtype)
            shards.append(Shard(file, [int(i) for batch in pending for i in batch[0].prompts], digest))
            index.save(output)
            pending, n_pending = [], 0
            progress(stored_set.name, stored_set.n_captured, n_prompts)
