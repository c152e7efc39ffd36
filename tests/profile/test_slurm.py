"""SLURM reads a plan, by a stand-in; and what the options of the executors rule out."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from planned import digests, plan_of, typed
from tiny import Tiny

import sts_fast
from sts_fast.cli import main

# Stands in for SLURM: sbatch runs the array's ranks at once, one after the other, and any other script.
SBATCH = """#!{python}
import os, re, subprocess, sys
script = sys.argv[-1]
array = re.search(r"#SBATCH --array=(.*)", open(script).read())
for rank in array[1].split(",") if array else ["0"]:
    subprocess.run(["bash", script], env={{**os.environ, "SLURM_ARRAY_TASK_ID": rank}}, check=True, stdout=2)
with open(script + ".submitted", "a") as file:
    file.write(" ".join(sys.argv[1:-1]) + "\\n")
print("17;cluster")
"""


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
