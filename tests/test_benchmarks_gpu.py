"""`make gpu` where there is no GPU: stages that hang, crash or end early leave all that the others have found."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmarks import gpu, gpu_stages

ROOT = Path(__file__).parents[1]
# A child that notes its own child's process id, for which it waits, as pytest or a sanitizer would be waited for.
WAITS = """
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
note(child=child.pid)
child.wait()
"""
STUB = """
import json, os, subprocess, sys, time
from pathlib import Path

def note(**found):
    print(chr(30) + json.dumps(found), flush=True)
"""


ROW = {"op": "shift", "d_in": 1, "d_sae": 2, "contestant": "ours", "median": 1, "of_floor": 1, "bytes": 1}


def stub(program: str) -> list[str]:
    return [sys.executable, "-c", STUB + textwrap.dedent(program)]


def is_alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def assert_ends(process: int) -> None:
    end = time.monotonic() + 5
    while is_alive(process) and time.monotonic() < end:
        time.sleep(0.02)
    assert not is_alive(process)


Run = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """run(programs by job, *arguments): the exit code and what was saved; a job without a program just ends well."""

    def go(programs: dict[str, str], *arguments: str, capability: str = "9.0") -> tuple[int, dict[str, Any]]:
        machine = {"gpu": "NVIDIA Stub", "capability": capability}
        command = property(lambda job: stub(programs.get(job.name, "note(finished=True)")))
        monkeypatch.setattr(gpu, "missing", lambda: None)
        monkeypatch.setattr(gpu, "machine_here", lambda: machine)
        monkeypatch.setattr(gpu, "RESULTS", tmp_path / "results")
        monkeypatch.setattr(gpu.Job, "command", command)
        code = gpu.main([*arguments, "--output", str(tmp_path / "out")])
        saved = [tmp_path / folder / "nvidia-stub.json" for folder in ("results", "out")]
        assert saved[0].read_bytes() == saved[1].read_bytes()
        return code, json.loads(saved[0].read_text(encoding="utf-8"))

    return go


def states(document: dict[str, Any]) -> dict[str, str]:
    return {name: found["state"] for name, found in document.items() if name not in ("kind", "machine")}


def test_a_hang_a_crash_and_an_early_end_leave_the_rest(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(gpu.LIMITS, "check", 1.5)
    programs = {
        "check sm80": "note(relative_errors={'a': 1e-6}); note(relative_errors={'b': 2e-6}); note(finished=True)",
        "check sm90": "note(relative_errors={'a': 3e-6})" + WAITS,
        "bench sm80": f"note(timings=[{ROW}]); print('half a'); note(timings=[{ROW}]); raise ValueError('third')",
        "forecast sm80": f"note(timings=[{ROW}])",
        "table sm80": "note(rounds=[1]); os.kill(os.getpid(), 11)",
        "graph sm80": "note(error='2 failed: x, y'); sys.exit(1)",
        "peers sm80": "print(chr(30) + '{\"timings\": [{'); note(finished=True)",
        "sanitize memcheck sm80": "note(why='there is no tool', finished=True)",
    }
    code, document = run(programs)
    assert code == 1
    assert states(document) == {
        "build": "done",
        "check sm80": "done",
        "check sm90": "failed",
        "verify": "done",
        "bench sm80": "failed",
        "forecast sm80": "failed",
        "table sm80": "failed",
        "graph sm80": "failed",
        "peers sm80": "done",
        "sanitize memcheck sm80": "skipped",
        "sanitize racecheck sm80": "done",
    }, "nothing more of the loop that hangs is run"
    assert document["check sm80"]["relative_errors"] == {"a": 1e-6, "b": 2e-6}
    assert document["check sm90"]["error"] == "not done within 1.5 seconds"
    assert document["check sm90"]["relative_errors"] == {"a": 3e-6}
    assert_ends(document["check sm90"]["child"])
    assert document["bench sm80"]["timings"] == [ROW, ROW]
    assert document["bench sm80"]["error"] == "exit code 1"
    assert document["bench sm80"]["output"][1] == "half a"
    assert document["bench sm80"]["output"][-1] == "ValueError: third"
    assert document["forecast sm80"]["error"] == "ended before it was finished"
    assert (document["table sm80"]["error"], document["table sm80"]["rounds"]) == ("killed by signal 11", [1])
    assert document["graph sm80"]["error"] == "2 failed: x, y"
    printed, log = capsys.readouterr().out, (tmp_path / "out" / "nvidia-stub.log").read_text(encoding="utf-8")
    for text in ("half a", "Traceback", "graph sm80: 2 failed: x, y"):
        assert text in printed
        assert text in log


def test_what_is_found_is_saved_at_once_and_only_what_is_asked_for_is_run(run: Run, tmp_path: Path) -> None:
    program = f"""
    note(timings=[{ROW}])
    end = time.monotonic() + 10
    while time.monotonic() < end:
        saved = json.loads(Path({str(tmp_path / "out" / "nvidia-stub.json")!r}).read_text())["bench sm80"]
        if saved.get("timings"):
            note(seen=saved["state"], finished=True)
            break
        time.sleep(0.02)
    """
    code, document = run({"bench sm80": program}, "bench", capability="8.0")
    assert code == 0
    assert states(document) == {"bench sm80": "done"}
    assert document["bench sm80"]["seen"] == "running"


def test_a_build_that_fails_ends_it_and_no_stage_begins_without_time(run: Run) -> None:
    code, document = run({"build": "sys.exit('no nvcc')"})
    assert (code, states(document)) == (1, {"build": "failed"})
    assert document["build"]["output"][-1] == "no nvcc"
    code, document = run({}, "check", "--seconds", "1")
    assert (code, states(document)["check sm80"]) == (1, "skipped")
    assert document["check sm80"]["why"] == "no time was left"


def test_what_a_stage_leaves_running_ends_with_it() -> None:
    found: dict[str, Any] = {}
    program = WAITS.replace("child.wait()", "note(finished=True)")
    assert gpu.run_apart(stub(program), 60, print, found.update) is None
    assert found["finished"]
    assert_ends(found["child"])


def test_a_signal_ends_the_stage_too() -> None:
    program = f"""
    from benchmarks import gpu
    gpu.exit_when_told()
    gpu.run_apart({stub(WAITS)!r}, 60, print, lambda found: print(found["child"], flush=True))
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as driver:
        assert driver.stdout is not None
        child = int(driver.stdout.readline())
        assert is_alive(child)
        os.kill(driver.pid, signal.SIGTERM)
        assert driver.wait(10) == 143
    assert_ends(child)


def test_a_case_that_fails_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def cases(stage: gpu_stages.Stage, variant: str) -> None:
        assert variant == "all"
        with stage.case("first"):
            raise ValueError("broken")
        stage.check("second", "fp32", 2e-5)
        stage.check("third", "fp32", float("nan"))
        stage.check("fourth", "bf16x2", 2e-4)

    monkeypatch.setitem(gpu_stages.STAGES, "cases", cases)
    assert gpu_stages.main("cases", "all") == 1
    said = capfd.readouterr()
    found: dict[str, Any] = {}
    for line in said.out.split("\n"):
        if line.startswith(gpu.RECORD):
            gpu.merge(found, json.loads(line[1:]))
    assert "ValueError: broken" in said.err
    assert found["errors"] == {
        "first": "ValueError: broken",
        "third": "off by nan, where 3e-05 is allowed",
        "fourth": "off by 0.0002, where 0.0001 is allowed",
    }
    assert found["error"] == "3 failed: first, third, fourth"
    assert list(found["relative_errors"]) == ["second", "third", "fourth"]
    assert "finished" not in found


def test_every_stage_is_one_that_can_be_run() -> None:
    assert set(gpu.LIMITS) == set(gpu_stages.STAGES) - {"small"}, "which the sanitizer runs"


def test_without_a_gpu_the_script_says_that_it_skips() -> None:
    if shutil.which("nvidia-smi") is not None:
        pytest.skip("there may be a GPU")
    command = [sys.executable, "-m", "benchmarks.gpu"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (ran.returncode, ran.stdout) == (0, "make gpu: skipped, torch sees no CUDA device\n")
    ran = subprocess.run([*command, "tests"], capture_output=True, text=True, check=False, cwd=ROOT)
    assert ran.returncode == 2
    assert ran.stderr == f"error: there is no stage tests: give any of {', '.join(gpu.LIMITS)}\n"
