"""A process that reads shards of a plan: it opens the model and the SAEs once, and then only reads and writes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from sts_fast.data.options import part
from sts_fast.data.prompts import PromptSet
from sts_fast.errors import InputError, listed
from sts_fast.model.language_model import LanguageModel
from sts_fast.model.memory import is_out_of_memory
from sts_fast.model.session import Loading, Purpose, Reading, Session
from sts_fast.ops import _cpu, backend
from sts_fast.profile.identity import Identity, identity_of
from sts_fast.profile.library import Library
from sts_fast.profile.pieces import Piece
from sts_fast.profile.profile import DamagedProfile, Profile, is_undamaged
from sts_fast.profile.read import read_profiles
from sts_fast.profile.work.merge import merge
from sts_fast.profile.work.plan import ProfilePlan, moved

Roots = Mapping[str, str]
Say = Callable[[str], None]


@dataclass(frozen=True)
class _WrittenBeside(Library):
    """A library that writes on a thread, one profile at a time, while the next one is read."""

    pool: ThreadPoolExecutor
    pending: list[Future[Path]] = field(default_factory=list)

    def add(self, profile: Profile) -> Path:
        self.wait()
        self.pending.append(self.pool.submit(Library.add, self, profile))
        return self.path_of(profile.identity)

    def get(self, identity: Identity, prompt_set: PromptSet) -> Profile | None:
        profile = super().get(identity, prompt_set)
        if profile is not None and not self.path_of(identity).exists():  # another one serves
            self.add(profile)
        return profile

    def wait(self) -> None:
        while self.pending:
            self.pending.pop().result()


class Worker:
    """Reads shards of a plan. Nothing of what it writes depends on which shards it read before.

    roots: the beginnings of paths on this machine by those in the plan
    say:   receives lines about how it goes
    """

    def __init__(self, plan: ProfilePlan, roots: Roots | None = None, say: Say | None = None) -> None:
        self.plan, self.roots, self.say = plan, roots or {}, say or (lambda line: None)

    @cached_property
    def session(self) -> Session:
        """Raises InputError where model or SAEs cannot be opened, or are others than the plan was made with."""
        import torch

        plan, work = self.plan, self.plan.work
        torch.set_num_threads(work.threads)
        _cpu.set_num_threads(work.threads)
        backend.set_precision(work.precision)
        loading = vars(part(Loading, plan.loading))
        reading = Reading(**loading, batch_tokens=work.batch_tokens, sae_dtype=work.sae_dtype, say=self.say)
        saes = [sae.open(work.sae_dtype, self.roots) for sae in plan.saes]
        model = moved(plan.model.path, self.roots)
        session = Session.open(model, saes, reading, purpose=Purpose(texts=False, run=False))
        assert session.checkpoint is not None
        plan.model.check(session.checkpoint)
        with _told_out_of_memory():
            reader = session.reader
            assert isinstance(reader, LanguageModel)
            reader.name = plan.model.source
            reader.passes.memory.fixed = True
            reader.settle(plan.sets)
        return session

    def read(self, shard: int, *, check_fit: bool = False) -> None:
        """Reads what of a shard is not in the library yet, and writes down that it is done.

        check_fit: checks first whether the SAEs seem to belong to the model. Raises InputError as `read_profiles` does.
        """
        plan, session = self.plan, self.session
        if check_fit:
            session.check_fit(plan.sets[plan.shards[shard][0].set])
        done: list[Path] = []
        try:
            with _told_out_of_memory(), ThreadPoolExecutor(1) as pool:
                libraries = _WrittenBeside(plan.library.place, pool), _WrittenBeside(plan.pieces.place, pool)
                for piece in plan.shards[shard]:
                    done += self._read(piece, libraries[0] if piece.is_whole(plan.sets) else libraries[1])
                for library in libraries:
                    library.wait()
            plan.finish(shard, done)
        except (InputError, OSError):
            if not plan.is_merged():  # by others, who removed the pieces that lay here
                raise

    def _read(self, piece: Piece, library: Library) -> list[Path]:
        plan, session = self.plan, self.session
        kind, prompt_set, whole = plan.kinds[piece.set], piece.of(plan.sets), plan.sets[piece.set]
        if not piece.is_whole(plan.sets):
            places = [
                plan.library.path_of(identity_of(session.reader, None, sae, kind, whole, plan.sampling))
                for sae in session.saes
            ]
            if all(map(is_undamaged, places)):
                return places
        while True:
            try:
                profiles = read_profiles(session.reader, session.saes, kind, prompt_set, plan.sampling, library=library)
                return [library.path_of(profile.identity) for profile in profiles]
            except DamagedProfile as error:
                self.say(f"{error.folder} is damaged: it is made again")
                shutil.rmtree(error.folder)


@contextmanager
def _told_out_of_memory() -> Iterator[None]:
    """Turns an error of memory into an InputError."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise InputError("memory ran out: plan again with fewer --workers or a smaller --batch-tokens") from error


@dataclass(frozen=True)
class Outcome:
    """What became of a shard in a process of its own.

    lines: what was said; error: why it could not be read, if so; is_hopeless: no other shard can be read either
    """

    lines: list[str]
    error: str | None = None
    is_hopeless: bool = False


_workers: dict[str, Worker] = {}
_lines: list[str] = []


def read_shard(plan: str, roots: Roots, shard: int) -> Outcome:
    """Reads a shard in a process that may have read others of the plan in this folder, and have its model open."""
    error, is_open = None, False
    try:
        if plan not in _workers:
            _workers.clear()  # of an earlier plan
            _workers[plan] = Worker(ProfilePlan.load(plan), roots, _lines.append)
        _workers[plan].session  # noqa: B018
        is_open = True
        _workers[plan].read(shard, check_fit=shard == 0)
    except InputError as raised:
        error = str(raised)
    said, _lines[:] = [*_lines], []
    return Outcome(said, error, error is not None and not is_open)


def run_rank(
    plan: ProfilePlan | str | Path,
    data: object = None,
    rank: int = 0,
    world_size: int = 1,
    *,
    roots: Roots | None = None,
    say: Say | None = None,
) -> None:
    """Reads the shards rank, rank + world_size, ... of a plan that are still missing; the last one to end merges.

    plan: or the path of its plan.json
    data: is not used; `functools.partial(run_rank, plan)` is what datatrove's executors call

    Raises InputError where a shard cannot be read, after the others.
    """
    if not 0 <= rank < world_size:
        raise InputError(f"--rank must lie between 0 and {world_size - 1}, below --world, and is {rank}")
    plan = plan if isinstance(plan, ProfilePlan) else ProfilePlan.load(plan)
    worker = Worker(plan, roots, say)
    missing = [shard for shard in plan.missing() if shard % world_size == rank]
    failed: dict[int, str] = {}
    if missing:
        worker.session  # noqa: B018 - what is wrong with it is wrong with every shard
    for shard in missing:
        try:
            worker.read(shard, check_fit=shard == 0)
        except InputError as error:
            failed[shard] = str(error)
    raise_failed(plan, failed)
    if not plan.missing():
        merge(plan)


def once(say: Say | None) -> Say:
    """Says each line once, however many workers say it."""
    said: set[str] = set()

    def say_new(line: str) -> None:
        if line not in said and say is not None:
            said.add(line)
            say(line)

    return say_new


def raise_failed(plan: ProfilePlan, failed: Mapping[int, str]) -> None:
    """Raises InputError that says which shards could not be read, and why."""
    if not failed:
        return
    shard, why = next(iter(failed.items()))
    sets = listed(dict.fromkeys(plan.sets[piece.set].name for piece in plan.shards[shard]))
    more = f"; and {len(failed) - 1} more shards could not be read" if len(failed) > 1 else ""
    raise InputError(f"shard {shard} (of {sets}) could not be read: {why}{more}; the others are kept")
