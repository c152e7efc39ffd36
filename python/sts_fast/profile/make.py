"""Profiles of many sets, kept in a library."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Unpack, get_args

from sts_fast.data.examples import Example
from sts_fast.data.folders import Use
from sts_fast.data.options import Option, part, shows
from sts_fast.data.progress import n_sent, with_whole
from sts_fast.data.prompts import PromptSet
from sts_fast.data.sets import (
    Fields,
    FieldsOptions,
    Kind,
    Sampling,
    SamplingOptions,
    Sets,
    Source,
    Sources,
    large_enough,
)
from sts_fast.errors import InputError
from sts_fast.files import hashed_inputs
from sts_fast.model.language_model import LanguageModel
from sts_fast.model.memory import usual_batch_tokens
from sts_fast.model.session import Loading, Purpose, Reading, ReadingOptions, SAESource, Session
from sts_fast.model.stored import is_activations
from sts_fast.profile.library import Library
from sts_fast.profile.pieces import cut
from sts_fast.profile.profile import Profile
from sts_fast.profile.read import read_set
from sts_fast.profile.work.plan import PlannedModel, PlannedSAE, ProfilePlan, Work
from sts_fast.sae import SAE

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Profiling(Sampling, Fields, Reading):
    """Options of making profiles; see Sampling, Fields and Reading.

    shown: whether sets are read behind demonstrations too, for D_N from demonstrations and for the estimator icl
    shard_tokens: most tokens that are read at once; larger sets are cut, and read piece by piece
    """

    TITLE = "Data"

    shown: Annotated[bool, Option("Read sets behind demonstrations too, as for the shift and icl.")] = True
    shard_tokens: Annotated[
        int, Option("Most tokens of a shard, which one worker reads and keeps; larger sets are cut.", least=1)
    ] = 500_000


class ProfilingOptions(SamplingOptions, FieldsOptions, ReadingOptions, total=False):
    """`Profiling` as keywords."""

    shown: bool
    shard_tokens: int


@shows(Profiling, ProfilingOptions)
def profile(
    *,
    model: str | Path | PreTrainedModel,
    sae: SAESource | Sequence[SAESource],
    library: str | Path,
    trains: Mapping[str, Source] | None = None,
    domains: Sources = (),
    demos: Sources | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **options: Unpack[ProfilingOptions],
) -> list[Profile]:
    """Makes the profile of each set with each SAE, and keeps them in a library.

    model, sae, domains, demos, tokenizer: as for `score`; trains: training sets by name
    library: a folder, or an address such as s3://bucket/lib; what is there already is not read again; `score` and
        `compare` with the same `library` read nothing of it
    options: see Profiling

    Returns the profiles, of all SAEs set by set; a set with too few prompts is left out with a warning. Raises
    InputError for unusable input.
    """
    profiling, kept = Profiling(**options), Library(library)
    kept.place.prepare()
    sets = _read(trains, domains, demos, profiling)
    session = Session.open(model, _several(sae), profiling, tokenizer=tokenizer)
    kinds, prompt_sets = _prompts(session, sets, profiling)
    session.check_fit(prompt_sets[0])
    if isinstance(session.reader, LanguageModel):
        session.reader.settle(prompt_sets)
    stages = {of.name: n_sent([of]) for of in prompt_sets}
    profiling = replace(profiling, progress=with_whole(profiling.progress, stages))
    made: list[Profile] = []
    for kind, prompt_set in zip(kinds, prompt_sets, strict=True):
        made += read_set(
            session.reader, session.saes, kind, prompt_set, profiling,
            library=kept, most_tokens=None if session.activations else profiling.shard_tokens,
            tell=partial(profiling.tell, prompt_set.name),
        )  # fmt: skip
    session.reader.say_passes()
    profiling.warn(
        *(f"no token of '{found.name}' is read, so that its profile is empty" for found in made if not found.n_tokens)
    )
    return made


@shows(Profiling, ProfilingOptions)
@shows(Profiling, ProfilingOptions)
def plan_profiles(
    *,
    model: str | Path,
    sae: SAESource | Sequence[SAESource],
    library: str | Path,
    trains: Mapping[str, Source] | None = None,
    domains: Sources = (),
    demos: Sources | None = None,
    threads: int | None = None,
    precision: str | None = None,
    **options: Unpack[ProfilingOptions],
) -> ProfilePlan:
    """Plans what `profile` does, for several processes or machines to do it, and writes the plan into the library.

    model:   a folder or hub id, of which only config and tokenizer are opened
    threads: of each process that reads; None for one a core. precision: of products on CUDA
    library: a folder that every worker sees; the rest: as for `profile`

    Raises InputError for unusable input, or for what workers could not open.
    """
    profiling, folder = Profiling(**options), Library(library).place.for_plans()
    if is_activations(model):
        raise InputError(f"{model} holds activations, which are read fast without a plan: leave out --executor")
    sets = _read(trains, domains, demos, profiling)
    session = Session.open(model, _several(sae), profiling, purpose=Purpose(run=False))
    assert session.checkpoint is not None
    kinds, prompt_sets = _prompts(session, sets, profiling)
    read = [(use, table.path) for use in get_args(Use) for table in sets.tables(use) if table.path is not None]
    return ProfilePlan(
        folder=folder,
        model=PlannedModel.of(session.checkpoint),
        saes=tuple(PlannedSAE.of(of, profiling.sae_dtype) for of in session.saes),
        loading=part(Loading, profiling),
        sampling=part(Sampling, profiling),
        work=Work(
            batch_tokens=profiling.batch_tokens or usual_batch_tokens(profiling.device),
            threads=threads or os.cpu_count() or 1,
            precision=precision,
            sae_dtype=profiling.sae_dtype,
        ),
        kinds=tuple(kinds),
        sets=tuple(prompt_sets),
        shards=tuple(cut(prompt_sets, profiling.shard_tokens)),
        inputs=tuple(entry for use, path in read for entry in hashed_inputs(use, [path])),
    ).saved(folder)


def _read(trains: Mapping[str, Source] | None, domains: Sources, demos: Sources | None, profiling: Profiling) -> Sets:
    sets = Sets.read(trains or {}, domains, demos, profiling)
    for line in sets.told():
        profiling.tell_line(line)
    return sets


def _several(sae: SAESource | Sequence[SAESource]) -> list[SAESource]:
    return [sae] if isinstance(sae, (str, Path, SAE)) else list(sae)


def _prompts(session: Session, sets: Sets, profiling: Profiling) -> tuple[list[Kind], list[PromptSet]]:
    """The sets that have prompts enough, with their kinds; the others are left out with a warning."""
    of_kinds: tuple[tuple[Kind, Mapping[str, list[Example]]], ...] = (("train", sets.trains), ("domain", sets.domains))

    def prompts(kind: Kind, name: str, examples: list[Example]) -> tuple[Kind, PromptSet]:
        return kind, session.prompts(kind, name, examples, sets.demos.get(name), profiling, show=profiling.shown)

    found, warnings = large_enough(
        "set", (partial(prompts, kind, *given) for kind, of_kind in of_kinds for given in of_kind.items())
    )
    profiling.warn(*warnings)
    return [kind for kind, _ in found], [prompt_set for _, prompt_set in found]
