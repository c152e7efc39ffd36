"""Executors of a plan: processes, Ray, a SLURM array, datatrove. Whoever reads, the profiles are the same bytes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from planned import digests, plan_of, sources
from tiny import Tiny

import sts_fast
from sts_fast.cli import main
from sts_fast.errors import InputError
from sts_fast.profile.work import local

# Stands in for SLURM: sbatch runs the array's ranks at once, one after the other, and any other script.
SBATCH = """#!{python}
import os, re, subprocess, sys
script = sys.argv[-1]
array = re.search(r"#SBATCH --array=(.*)", open(script).read())
for rank in array[1].split(",") if array else ["0"]:
    subprocess.run(["bash", script], env={{**os.environ, "SLURM_ARRAY_TASK_ID": rank}}, check=True)
with open(script + ".submitted", "a") as file:
    file.write(" ".join(sys.argv[1:-1]) + "\\n")
print("17;cluster")
"""


@pytest.fixture(scope="module")
def expected(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What one process makes without a plan."""
    library = tmp_path_factory.mktemp("expected") / "lib"
    sts_fast.profile(**sources(tiny), library=library)
    return digests(library)


def typed(tiny: Tiny, library: Path) -> list[str]:
    """The command line of the plan of `planned`."""
    given = sources(tiny)
    command = ["profile", "--model", str(given["model"]), "--threads", "1", "--library", str(library)]
    for option, values in (
        ("--sae", given["sae"]),
        ("--train", [f"{name}={path}" for name, path in given["trains"].items()]),
        ("--domains", [f"{name}={path}" for name, path in given["domains"].items()]),
    ):
        command += [word for value in values for word in (option, str(value))]
    for option in ("shots", "domain_shots", "limit", "demo_draws", "shard_tokens"):
        command += [f"--{option.replace('_', '-')}", str(given[option])]
    return command


def test_processes_make_the_same_bytes(tiny: Tiny, tmp_path: Path, expected: dict[str, str]) -> None:
    plan = plan_of(tiny, tmp_path / "lib")
    told: list[tuple[int, int]] = []
    sts_fast.run_local(plan, 2, tell=lambda done, total: told.append((done, total)))
    assert digests(tmp_path / "lib") == expected
    assert told[-1] == (len(plan.shards), len(plan.shards))


def deadly(shard: int) -> list[str]:
    """Kills the worker of the second shard."""
    if shard == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return local._read(shard)  # in the worker, where it is what it was


def test_a_shard_that_kills_its_worker_is_left_out_and_said(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(tiny, tmp_path / "lib")
    said: list[str] = []
    monkeypatch.setattr(local, "_read", deadly)
    with pytest.raises(InputError, match="its worker was killed 3 times"):
        sts_fast.run_local(plan, 1, say=said.append)
    assert [line for line in said if "killed" in line] == [
        f"the worker of shard 1 was killed ({n} of 3 times): it is read again" for n in (1, 2)
    ]
    assert plan.missing() == [1]


def test_ray_makes_the_same_bytes_though_a_worker_is_lost(tiny: Tiny, tmp_path: Path, expected: dict[str, str]) -> None:
    pytest.importorskip("ray")
    command = [sys.executable, "-m", "sts_fast.cli", *typed(tiny, tmp_path / "lib"), "--executor", "ray"]
    with subprocess.Popen([*command, "--workers", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as driver:
        while driver.poll() is None and not (reading := processes_called("ray::_read")):
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


def test_slurm_gets_the_ranks_that_are_missing(
    tiny: Tiny, tmp_path: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    plan = plan_of(tiny, tmp_path / "lib")
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "sbatch").write_text(SBATCH.format(python=sys.executable))
    (bin_folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_folder}:{os.environ['PATH']}")
    sts_fast.run_rank(plan, None, 1, 3)
    command = ["sts-fast", *typed(tiny, tmp_path / "lib"), "--executor", "slurm", "--workers", "3"]
    monkeypatch.setattr(sys, "argv", command)
    main()
    assert "Submitted: array 17 of 2 ranks" in capsys.readouterr().out
    assert "#SBATCH --array=0,2\n" in (plan.folder / "read.sh").read_text()
    assert "--dependency=afterany:17" in (plan.folder / "merge.sh.submitted").read_text()
    assert digests(tmp_path / "lib") == expected


def test_datatrove_runs_ranks(tiny: Tiny, tmp_path: Path, expected: dict[str, str]) -> None:
    executor = pytest.importorskip("datatrove.executor").LocalPipelineExecutor
    plan = plan_of(tiny, tmp_path / "lib")
    executor(
        [partial(sts_fast.run_rank, str(plan.folder))], tasks=2, workers=1, logging_dir=str(tmp_path / "logs")
    ).run()
    assert digests(tmp_path / "lib") == expected


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--workers", "2"], "--workers is for an executor"),
        (["--executor", "local", "--address", "auto"], "--address is for --executor ray"),
        (["--print"], "--print is for --executor slurm"),
        (["--executor", "mpi"], "'mpi' is not one of 'local', 'ray', 'slurm'"),
    ],
)
def test_an_option_of_another_executor_is_refused(
    options: list[str], error: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["sts-fast", "profile", "--model", "m", "--sae", "s", *options])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert error in capsys.readouterr().err


def test_rank_below_world(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--rank must lie between 0 and 1"):
        sts_fast.run_rank(plan_of(tiny, tmp_path / "lib"), None, 2, 2)
