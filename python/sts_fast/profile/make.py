"""Profiles of many sets, kept in a library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Unpack

from sts_fast.data.examples import Example
from sts_fast.data.options import Option
from sts_fast.data.sets import (
    Fields,
    FieldsOptions,
    Kind,
    Sampling,
    SamplingOptions,
    Sets,
    Source,
    Sources,
    check_enough,
)
from sts_fast.errors import InputError, SetTooSmall
from sts_fast.model.session import Reading, ReadingOptions, SAESource, Session
from sts_fast.profile.library import Library
from sts_fast.profile.profile import Profile
from sts_fast.profile.read import read_profiles
from sts_fast.sae import SAE

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Profiling(Sampling, Fields, Reading):
    """Options of making profiles; see Sampling, Fields and Reading.

    shown: whether sets are read behind demonstrations too, for D_N from demonstrations and for the estimator icl
    """

    TITLE = "Data"

    shown: Annotated[bool, Option("Read sets behind demonstrations too, as for the shift and icl.")] = True


class ProfilingOptions(SamplingOptions, FieldsOptions, ReadingOptions, total=False):
    """`Profiling` as keywords."""

    shown: bool


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
    """Makes the profile of each set with each SAE, and keeps them in a library, a folder.

    model, sae, domains, demos, tokenizer: as for `score`; trains: training sets by name
    library: what is there already is not read again; `score` and `compare` with the same `library` read nothing of it
    options: see Profiling

    Returns the profiles, of all SAEs set by set; a set with too few prompts is left out with a warning. Raises
    InputError for unusable input.
    """
    profiling = Profiling(**options)
    sets = Sets.read(trains or {}, domains, demos, profiling)
    for line in sets.told():
        profiling.tell_line(line)
    saes = [sae] if isinstance(sae, (str, Path, SAE)) else list(sae)
    session = Session.open(model, saes, profiling, tokenizer=tokenizer)
    kinds: tuple[tuple[Kind, Mapping[str, list[Example]]], ...] = (("train", sets.trains), ("domain", sets.domains))
    prompt_sets = []
    left_out: list[str] = []
    for kind, of_kind in kinds:
        for name, examples in of_kind.items():
            demonstrations = sets.demos.get(name)
            try:
                prompt_set = session.prompts(kind, name, examples, demonstrations, profiling, show=profiling.shown)
                check_enough(prompt_set, session.context_length, kind)
                prompt_sets.append((kind, prompt_set))
            except SetTooSmall as error:
                left_out.append(str(error))
    if not prompt_sets:
        raise InputError(left_out[0] + ("" if len(left_out) == 1 else "; and no other set can be used either"))
    profiling.warn(*(f"a set is left out: {why}" for why in left_out))
    session.check_fit(prompt_sets[0][1])
    made: list[Profile] = []
    for kind, prompt_set in prompt_sets:
        made += read_profiles(
            session.reader, session.saes, kind, prompt_set, profiling,
            library=Library(Path(library)), tell=partial(profiling.tell, prompt_set.name),
        )  # fmt: skip
    session.reader.say_passes()
    profiling.warn(
        *(f"no token of '{found.name}' is read, so that its profile is empty" for found in made if not found.n_tokens)
    )
    return made
