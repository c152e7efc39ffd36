"""Ray reads a plan: the same bytes, though a worker is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from planned import digests, plan_of, typed
from tiny import Tiny

import sts_fast
from sts_fast.errors import InputError


def test_ray_makes_the_same_bytes_though_a_worker_is_lost(tiny: Tiny, tmp_path: Path, expected: dict[str, str]) -> None:
    pytest.importorskip("ray")
    command = [sys.executable, "-m", "sts_fast", *typed(tiny, tmp_path / "lib"), "--executor", "ray"]
    with subprocess.Popen([*command, "--workers", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as driver:
        while driver.poll() is None and not (reading := processes_called("ray::read_shard")):
            time.sleep(0.05)
        os.kill(reading[0], signal.SIGKILL)
        out, err = driver.communicate()
    assert driver.returncode == 0, err.decode()
    assert b"3 sets are in" in out
    assert digests(tmp_path / "lib") == expected


def processes_called(title: str) -> list[int]:
    """Of all processes of this machine."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += [int(path.parent.name)] if path.read_bytes().startswith(title.encode()) else []
    return found


def test_a_cluster_that_does_not_answer_is_told(tiny: Tiny, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    with pytest.raises(InputError, match=r"no Ray cluster answers at 127\.0\.0\.1:1"):
        sts_fast.run_ray(plan_of(tiny, tmp_path / "lib"), sts_fast.RayCluster(address="127.0.0.1:1"))
