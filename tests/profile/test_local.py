"""Processes that read a plan: the same bytes, though some are killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from planned import digests, plan_of
from tiny import Tiny

import sts_fast
from sts_fast.errors import InputError
from sts_fast.profile.work import local, worker


def test_processes_make_the_same_bytes(tiny: Tiny, tmp_path: Path, expected: dict[str, str]) -> None:
    plan = plan_of(tiny, tmp_path / "lib")
    told: list[tuple[int, int]] = []
    sts_fast.run_local(plan, 2, tell=lambda done, total: told.append((done, total)))
    assert digests(tmp_path / "lib") == expected
    assert told[-1] == (len(plan.shards), len(plan.shards))


def deadly(plan: str, roots: dict[str, str], shard: int) -> worker.Outcome:
    """Kills the worker of the second shard."""
    if shard == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return worker.read_shard(plan, roots, shard)


def test_a_shard_that_kills_its_worker_is_left_out_and_said(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(tiny, tmp_path / "lib")
    said: list[str] = []
    monkeypatch.setattr(local, "read_shard", deadly)
    with pytest.raises(InputError, match="its worker was killed 3 times"):
        sts_fast.run_local(plan, 1, say=said.append)
    assert [line for line in said if "killed" in line] == [
        f"the worker of shard 1 was killed ({n} of 3 times): it is read again" for n in (1, 2)
    ]
    assert plan.missing() == [1]
