"""sts-fast profile."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from sts_fast import files
from sts_fast.cli.arguments import Core, Places, named_trains, typed_command
from sts_fast.cli.console import out, progress, say
from sts_fast.cli.options import Demos, Model, SAEs
from sts_fast.data.options import Option
from sts_fast.profile.make import Profiling
from sts_fast.profile.make import profile as make_profiles


@dataclass(frozen=True)
class Sources:
    """The model and SAEs that read, and the sets that are read."""

    model: Model
    sae: SAEs
    train: Annotated[list[str] | None, Option("A training set: path, or name=path; repeatable.")] = None
    domains: Annotated[list[str] | None, Option("As for score; repeatable.")] = None
    demos: Demos = None


def profile(
    sources: Sources,
    profiling: Profiling,
    places: Places,
    core: Core,
    library: Annotated[Path, Option("Folder of the profiles; sets that are in it are not read again.")] = Path(
        "sts-fast-library"
    ),
) -> None:
    """Read sets once: a profile of each, from which forecasts are made without reading it again."""
    core.apply()
    files.prepare_folder(library)
    with progress() as tell:
        made = make_profiles(
            model=sources.model,
            sae=places.load(sources.sae, profiling.sae_dtype),
            library=library,
            trains=named_trains(sources.train or []),
            domains=sources.domains or [],
            demos=sources.demos,
            **vars(replace(profiling, command=typed_command(), progress=tell, say=say)),
        )
    for profile in made:
        n = len(profile.rows)
        out.print(
            f"{profile.name} ({profile.identity.kind}): {n:,} prompts, {profile.n_tokens:,} tokens, "
            f"{len(profile.rows.indices) / max(n, 1):,.0f} features a prompt, with {profile.identity.sae['source']}",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
