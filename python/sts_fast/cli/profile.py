"""sts-fast profile, work and merge."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from sts_fast.cli.arguments import Core, Places, named_trains, typed_command
from sts_fast.cli.console import out, progress, say
from sts_fast.cli.options import Demos, Model, SAEs
from sts_fast.cli.output import completed
from sts_fast.data.options import Checked, Option
from sts_fast.errors import InputError
from sts_fast.profile.library import Library
from sts_fast.profile.make import Profiling, plan_profiles
from sts_fast.profile.make import profile as make_profiles
from sts_fast.profile.work import Array, ProfilePlan, RayCluster, run_local, run_rank, run_ray
from sts_fast.profile.work import merge as merge_plan

Executor = Literal["local", "ray", "slurm"]
PlanPath = Annotated[Path, typer.Argument(help="plan.json of sts-fast profile --plan-only.")]
RootsOption = Annotated[
    list[str] | None, Option("Where paths of the plan begin on this machine: old=new; repeatable.", "--root")
]


@dataclass(frozen=True)
class Sources:
    """The model and SAEs that read, and the sets that are read."""

    model: Model
    sae: SAEs
    train: Annotated[list[str] | None, Option("A training set: path, or name=path; repeatable.")] = None
    domains: Annotated[list[str] | None, Option("As for score; repeatable.")] = None
    demos: Demos = None


@dataclass(frozen=True)
class Machines(Checked):
    """Options of reading with several processes."""

    TITLE = "Machines"

    executor: Annotated[
        Executor | None,
        Option("Read with several processes: local, on this machine; ray, on a cluster; slurm, as a job array."),
    ] = None
    workers: Annotated[
        int | None, Option("Processes; default: one a GPU, or one; of ray: as many as fit.", least=1)
    ] = None
    plan_only: Annotated[bool, Option("Write the plan and read nothing; sts-fast work reads its shards.")] = False
    address: Annotated[str | None, Option("Of a Ray cluster that runs already; default: one on this machine.")] = None
    gpus: Annotated[float | None, Option("GPUs of one Ray worker; default: one where there are some.")] = None
    sbatch: Annotated[str, Option("Options of sbatch, as in '--partition=gpu --gres=gpu:1 --time=1:00:00'.")] = ""
    print_only: Annotated[bool, Option("Show the SLURM job, and submit nothing.", "--print")] = False

    def check(self) -> None:
        """Raises InputError for an option of another executor."""
        given = {
            "--address": (self.address is not None, "ray"),
            "--gpus": (self.gpus is not None, "ray"),
            "--sbatch": (bool(self.sbatch), "slurm"),
            "--print": (self.print_only, "slurm"),
        }
        for option, (is_given, executor) in given.items():
            if is_given and self.executor != executor:
                raise InputError(f"{option} is for --executor {executor}: give that too, or leave {option} out")
        if self.workers is not None and self.executor is None and not self.plan_only:
            raise InputError("--workers is for an executor: give --executor local, ray or slurm too")


def profile(
    sources: Sources,
    profiling: Profiling,
    places: Places,
    core: Core,
    machines: Machines,
    library: Annotated[
        Path, Option("Folder of the profiles, or as s3://bucket/lib; sets that are in it are not read again.")
    ] = Path("sts-fast-library"),
) -> None:
    """Read sets once: a profile of each, from which forecasts are made without reading it again."""
    machines.check()
    core.apply()
    planned, place = machines.executor is not None or machines.plan_only, Library(library).place
    if planned:
        place.for_plans()
    else:
        place.prepare()
    given: dict[str, Any] = {
        "model": sources.model,
        "sae": places.load(sources.sae, profiling.sae_dtype),
        "library": library,
        "trains": named_trains(sources.train or []),
        "domains": sources.domains or [],
        "demos": sources.demos,
    }
    profiling = replace(profiling, command=typed_command(), say=say)
    if planned:
        n_workers = machines.workers or 1
        threads = core.threads or max(1, (os.cpu_count() or 1) // (n_workers if machines.executor != "slurm" else 1))
        with completed(library):
            _run(plan_profiles(**given, threads=threads, precision=core.precision, **vars(profiling)), machines)
        return
    with completed(library), progress() as tell:
        made = make_profiles(**given, **vars(replace(profiling, progress=tell)))
    for profile in made:
        n = len(profile.rows)
        out.print(
            f"{profile.name} ({profile.identity.kind}): {n:,} prompts, {profile.n_tokens:,} tokens, "
            f"{len(profile.rows.indices) / max(n, 1):,.0f} features a prompt, with {profile.identity.sae['source']}",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip


def work(
    plan: PlanPath,
    rank: Annotated[int, Option("Read the shards rank, rank + world, ...")] = 0,
    world: Annotated[int, Option("Processes that work on the plan, each with a rank of its own.", least=1)] = 1,
    root: RootsOption = None,
) -> None:
    """Read shards of a plan that are still missing; the last process to end puts all together."""
    read = ProfilePlan.load(plan)
    with completed(read.folder):
        run_rank(read, None, rank, world, roots=_roots(root), say=say)
    _tell_state(read)


def merge(plan: PlanPath) -> None:
    """Put the shards of a plan together, once all are read."""
    read = ProfilePlan.load(plan)
    merge_plan(read)
    _tell_state(read)


def _run(plan: ProfilePlan, machines: Machines) -> None:
    """Works through a plan, as the options say."""
    tokens = sum(plan.n_tokens)
    print_line(f"{plan.folder / 'plan.json'}: {len(plan.sets)} sets, {tokens:,} tokens, {len(plan.shards)} shards")
    if machines.plan_only:
        print_line(f"Next: sts-fast work {plan.folder / 'plan.json'} --rank R --world W, for every R below W")
        return
    if machines.executor == "slurm":
        array = Array.of(plan, machines.workers or len(plan.shards), shlex.split(machines.sbatch), {})
        if machines.print_only:
            sys.stdout.write(f"{array.read}\n{array.merge}")
        elif not array.ranks:
            merge_plan(plan)
            _tell_state(plan)
        else:
            read, behind = array.submit()
            print_line(f"Submitted: array {read} of {len(array.ranks)} ranks, and {behind}, which puts them together")
        return
    with progress("shards") as tell:
        if machines.executor == "ray":
            cluster = RayCluster(machines.address, machines.workers, machines.gpus)
            run_ray(plan, cluster, say=say, tell=partial(tell, "shards"))
        else:
            run_local(plan, machines.workers, say=say, tell=partial(tell, "shards"))
    _tell_state(plan)


def _tell_state(plan: ProfilePlan) -> None:
    missing = plan.missing()
    if missing:
        print_line(f"{len(plan.shards) - len(missing)} of {len(plan.shards)} shards are read")
    else:
        print_line(f"{len(plan.sets)} sets are in {plan.library}, read with {len(plan.saes)} SAEs")


def _roots(rows: Sequence[str] | None) -> dict[str, str]:
    roots = {}
    for row in rows or []:
        old, equals, new = row.partition("=")
        if not (old and equals and new):
            raise InputError(f"--root takes old=new, and not '{row}'")
        roots[old] = new
    return roots


def print_line(line: str) -> None:
    out.print(line, highlight=False, markup=False, soft_wrap=True)
