"""Plans of profiles: cut, read by workers in any order and by any of them, killed, and put together the same."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planned import digests, plan_of, sources
from tiny import Tiny

import sts_fast
from sts_fast.data.prompts import Prompt, PromptSet
from sts_fast.errors import InputError
from sts_fast.profile.pieces import Piece, cut
from sts_fast.profile.profile import ROWS_FILE
from sts_fast.profile.work import merge
from sts_fast.profile.work.plan import DONE_FOLDER, MERGED_FILE, PlannedModel, ProfilePlan
from sts_fast.profile.work.worker import Worker

PLAN_NAMES = ["merged.json", "plan.json", "prompts.parquet"]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def made_up(lengths: list[int], *, shown: bool = False) -> PromptSet:
    some = np.zeros(3 if shown else 0, np.int32)
    prompts = [Prompt(str(n), np.zeros(n, np.int32), some, some, some, some, 0) for n in lengths]
    return PromptSet("set", prompts, 0, 0)


def test_sets_are_cut_into_shards_of_whole_prompts() -> None:
    sets = [made_up([10, 10]), made_up([10]), made_up([40, 40, 40, 40]), made_up([500]), made_up([5], shown=True)]
    shards = cut(sets, 100)
    assert shards == [
        (Piece(0, 0, 2), Piece(1, 0, 1)),
        (Piece(2, 0, 2),),
        (Piece(2, 2, 4),),
        (Piece(3, 0, 1),),
        (Piece(4, 0, 1),),
    ]
    rng = np.random.default_rng(0)
    for _ in range(200):
        drawn = [made_up(rng.integers(1, 60, rng.integers(1, 30)).tolist()) for _ in range(rng.integers(1, 6))]
        most = int(rng.integers(20, 400))
        pieces = [piece for shard in cut(drawn, most) for piece in shard]
        for index, prompt_set in enumerate(drawn):
            read = [i for piece in pieces if piece.set == index for i in range(piece.start, piece.stop)]
            assert read == [*range(len(prompt_set.prompts))]
        for shard in cut(drawn, most):
            sizes = [len(prompt.base_ids) for piece in shard for prompt in piece.of(drawn).prompts]
            assert sum(sizes) <= most + max(sizes)


def test_a_plan_is_the_same_each_time_and_can_be_read_again(tiny: Tiny, tmp_path: Path) -> None:
    one, other = plan_of(tiny, tmp_path / "one"), plan_of(tiny, tmp_path / "other")
    assert one.key == other.key
    for name in ("plan.json", "prompts.parquet"):
        assert (one.folder / name).read_bytes() == (other.folder / name).read_bytes()
    again = ProfilePlan.load(one.folder / "plan.json")
    assert again.key == one.key
    assert again.missing() == [*range(len(one.shards))]
    assert len(one.shards) > 3
    assert any(not piece.is_whole(one.sets) for shard in one.shards for piece in shard)
    first, *others = one.sets
    renamed = replace(first, prompts=[replace(prompt, id=f"new {prompt.id}") for prompt in first.prompts])
    assert replace(one, sets=(renamed, *others)).key != one.key


@pytest.mark.parametrize("world", [1, 3])
def test_any_ranks_in_any_order_make_the_same_bytes(
    tiny: Tiny, tmp_path: Path, expected: dict[str, str], world: int
) -> None:
    plan = plan_of(tiny, tmp_path / "lib")
    for rank in reversed(range(world)):
        assert not (plan.folder / MERGED_FILE).exists()
        partial(sts_fast.run_rank, plan.folder / "plan.json")(None, rank, world)
    assert digests(tmp_path / "lib") == expected
    assert plan.missing() == []
    assert names_in(plan.folder) == PLAN_NAMES
    sts_fast.run_rank(plan)  # there is nothing left to do


def test_paths_may_differ_where_the_plan_is_worked_on(tiny: Tiny, tmp_path: Path, expected: dict[str, str]) -> None:
    plan = plan_of(tiny, tmp_path / "lib")
    there = tmp_path / "there"
    there.mkdir()
    shutil.move(tmp_path / "lib", there / "lib")
    shutil.copytree(tiny.model, there / "model")
    plan = ProfilePlan.load(there / "lib" / "plans" / plan.folder.name)
    sts_fast.run_rank(plan, roots={str(tiny.model): str(there / "model")})
    assert digests(there / "lib") == expected


def test_what_is_damaged_is_read_again(tiny: Tiny, tmp_path: Path, expected: dict[str, str]) -> None:
    library = tmp_path / "lib"
    plan = plan_of(tiny, library)
    worker = Worker(plan)
    for shard in range(len(plan.shards)):
        worker.read(shard)
    files = sorted([*library.glob(f"plans/*/pieces/*/{ROWS_FILE}")])[:2] + sorted(library.glob(f"*/{ROWS_FILE}"))[:1]
    files[0].write_bytes(files[0].read_bytes()[:-9])
    flipped = bytearray(files[1].read_bytes())
    flipped[100] ^= 1
    files[1].write_bytes(flipped)
    shutil.rmtree(files[2].parent)
    assert 1 <= len(plan.missing()) <= 3
    sts_fast.run_rank(plan)
    assert digests(library) == expected
    index, rows = next(library.glob("sums*/profile.json")), next(library.glob(f"days*/{ROWS_FILE}"))
    for whole in (
        index,
        rows,
        plan.folder / "prompts.parquet",
        plan.folder / "plan.json",
    ):  # of a set that was cut, too
        whole.write_bytes(whole.read_bytes()[:-9])
        sts_fast.run_rank(plan_of(tiny, library))
        assert digests(library) == expected
        assert names_in(plan.folder) == PLAN_NAMES


@pytest.mark.parametrize("killed", ["before", "after"])
def test_a_merge_that_was_killed_is_done_again(
    tiny: Tiny, tmp_path: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch, killed: str
) -> None:
    """Whole sets are in the library, and pieces too, of which one must be read again."""
    plan = plan_of(tiny, tmp_path / "lib")
    worker = Worker(plan)
    for shard in range(len(plan.shards)):
        worker.read(shard)

    class Killed(BaseException):
        pass

    def dies(self: ProfilePlan, name: str, profiles: Any) -> None:
        if killed == "after":
            write(self, name, profiles)
        raise Killed

    write = ProfilePlan.write_record
    with monkeypatch.context() as patch:
        patch.setattr(ProfilePlan, "write_record", dies)
        with pytest.raises(Killed):
            merge(plan)
    next(plan.folder.glob(f"pieces/*/{ROWS_FILE}")).write_bytes(b"")
    sts_fast.run_rank(plan)
    assert digests(tmp_path / "lib") == expected
    assert names_in(plan.folder) == PLAN_NAMES


def test_many_may_merge_at_once(tiny: Tiny, tmp_path: Path, expected: dict[str, str]) -> None:
    plan = plan_of(tiny, tmp_path / "lib")
    worker = Worker(plan)
    for shard in range(len(plan.shards)):
        worker.read(shard)
    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(merge, [plan] * 8)] == [None] * 8
    worker.read(2)  # a piece, by one who did not know
    merge(plan)
    assert digests(tmp_path / "lib") == expected
    assert names_in(plan.folder) == PLAN_NAMES


def test_saes_at_different_layers_share_a_plan(tiny: Tiny, tmp_path: Path) -> None:
    saes = [sts_fast.load_sae(tiny.saes["topk"], layer=layer) for layer in (1, 3)]
    given = sources(tiny) | {"sae": saes}
    sts_fast.profile(**given, library=tmp_path / "one")
    plan = sts_fast.plan_profiles(**given, library=tmp_path / "lib", threads=1)
    for rank in (1, 0):
        sts_fast.run_rank(plan, None, rank, 2)
    assert digests(tmp_path / "lib") == digests(tmp_path / "one")


def test_one_file_as_two_sets_gives_the_same_in_any_order(tiny: Tiny, tmp_path: Path) -> None:
    """Asked alone, both have the same prompts, and the one that is read second is taken from the first."""
    given = sources(tiny) | {"domains": {"again": tiny.train}, "shown": False, "shard_tokens": 150}
    found = []
    for name, step in (("one", 1), ("other", -1)):
        plan = sts_fast.plan_profiles(**given, library=tmp_path / name, threads=1)
        worker = Worker(plan)
        for shard in range(len(plan.shards))[::step]:
            worker.read(shard)
        merge(plan)
        found.append(digests(tmp_path / name))
    assert found[0] == found[1]


def test_a_library_with_demonstrations_serves_a_plan_without(tiny: Tiny, tmp_path: Path) -> None:
    sts_fast.profile(**sources(tiny), library=tmp_path / "lib")
    plan = sts_fast.plan_profiles(**sources(tiny), library=tmp_path / "lib", threads=1, shown=False)
    sts_fast.run_rank(plan)
    assert plan.missing() == []


def test_a_shard_that_cannot_be_read_is_named_and_the_others_are_kept(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(tiny, tmp_path / "lib")
    read = Worker.read

    def reads(self: Worker, shard: int, **options: Any) -> None:
        if shard == 1:
            raise InputError("this one cannot be read")
        read(self, shard, **options)

    monkeypatch.setattr(Worker, "read", reads)
    with pytest.raises(InputError, match=r"shard 1 \(of .*\) could not be read: this one cannot"):
        sts_fast.run_rank(plan)
    assert plan.missing() == [1]


def test_another_model_or_plan_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    plan = plan_of(tiny, tmp_path / "lib")
    other = tmp_path / "model"
    shutil.copytree(tiny.model, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_theta": 77.0}))
    with pytest.raises(InputError, match=r"not the model that the plan was made with: config\.json"):
        sts_fast.run_rank(plan, roots={str(tiny.model): str(other)})
    with pytest.raises(InputError, match="is another SAE than the plan was made with"):
        sts_fast.run_rank(plan, roots={str(tiny.saes["topk"]): str(tiny.saes["jumprelu"])})
    file = plan.folder / "plan.json"
    document = json.loads(file.read_text())
    for change, error in (
        ({"sts_fast": "9.9"}, "made by sts-fast 9.9"),
        ({"shards": document["shards"][:-1]}, "changed by hand"),
        ({"sets": 3}, "is damaged"),
        ({"format": "other"}, "is no plan"),
    ):
        file.write_text(json.dumps(document | change))
        with pytest.raises(InputError, match=error):
            ProfilePlan.load(file)
    file.write_text(json.dumps(document))
    (plan.folder / "prompts.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="missing or damaged"):
        ProfilePlan.load(file)


def test_different_weights_are_not_put_together(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(tiny, tmp_path / "lib")
    with pytest.raises(InputError, match=r"not the model that the plan was made with: model\.safetensors differ"):
        Worker(plan, {str(tiny.model): str(tiny.tuned)}).session  # noqa: B018
    monkeypatch.setattr(PlannedModel, "check", lambda self, checkpoint: None)
    half = len(plan.shards) // 2
    worker, other = Worker(plan), Worker(plan, {str(tiny.model): str(tiny.tuned)})
    for shard in range(len(plan.shards)):
        (worker if shard < half else other).read(shard)
    with pytest.raises(InputError, match="were read with different models"):
        sts_fast.run_rank(plan)
    assert (plan.folder / DONE_FOLDER).is_dir()


def test_datatrove_runs_ranks(tiny: Tiny, tmp_path: Path, expected: dict[str, str]) -> None:
    executor = pytest.importorskip("datatrove.executor").LocalPipelineExecutor
    plan = plan_of(tiny, tmp_path / "lib")
    executor(
        [partial(sts_fast.run_rank, str(plan.folder))], tasks=2, workers=1, logging_dir=str(tmp_path / "logs")
    ).run()
    assert digests(tmp_path / "lib") == expected


def test_rank_below_world(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--rank must lie between 0 and 1"):
        sts_fast.run_rank(plan_of(tiny, tmp_path / "lib"), None, 2, 2)
