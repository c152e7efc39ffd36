"""The check of the CUDA kernels before they serve a device: kernels that are right, wrong, crash and hang."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sts_fast.errors import InputError
from sts_fast.ops import backend, cuda, cuda_kernels, verified
from sts_fast.ops.verified import Verdict

GPU = torch.device("cuda:0")
NOTHING_WRONG = {"case": "all", "verdict": {"loop": "automatic", "why": ""}}


def command(*lines: str) -> list[str]:
    return [sys.executable, "-c", "\n".join(["import json, os, subprocess, sys, time", *lines])]


def says(**found: Any) -> str:
    return f"print(json.dumps({found!r}), flush=True)"


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[list[str]]]:
    """A machine with a GPU and our kernels, whose check prints a verdict; and the commands that were run."""
    library = tmp_path / "_cuda.so"
    library.write_bytes(b"kernels")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cuda_kernels, "missing_reason", lambda: None)
    monkeypatch.setattr(cuda_kernels, "kernels", SimpleNamespace(__file__=str(library)))
    monkeypatch.setattr(verified, "name_of", lambda device: "H200")
    monkeypatch.setattr(cuda, "main_loops", {})
    ran: list[list[str]] = []

    def finds(printed: str) -> list[list[str]]:
        real = verified.checked

        def checked(words: Any) -> Verdict:
            ran.append(list(words))
            return real(command(printed))

        monkeypatch.setattr(verified, "checked", checked)
        verified.verdict.cache_clear()
        return ran

    yield finds
    verified.verdict.cache_clear()


def test_right_kernels_pass_and_are_remembered(asked: Any, tmp_path: Path) -> None:
    ran = asked(says(**NOTHING_WRONG))
    for _ in range(2):
        assert verified.verdict(GPU) == Verdict("automatic")
        verified.verdict.cache_clear()
    assert ran == [[sys.executable, "-m", "sts_fast.ops.verified", "cuda:0"]]
    assert cuda.main_loops == {GPU: "automatic"}
    (tmp_path / "_cuda.so").write_bytes(b"other kernels")
    verified.verdict(GPU)
    assert len(ran) == 2
    for path in (tmp_path / "cache").rglob("*.json"):
        path.write_text("{", encoding="utf-8")
    verified.verdict.cache_clear()
    assert verified.verdict(GPU).loop == "automatic"
    assert len(ran) == 3


@pytest.mark.parametrize("loop", ["sm80", None])
def test_what_differs_is_said_once_and_another_serves(loop: str | None, asked: Any) -> None:
    asked(says(case="all", verdict={"loop": loop, "why": "relu: encode_sparse finds other values"}))
    served = "their sm80 loop" if loop else "torch"
    wanted = rf"fail their check on H200, {served} computes instead: relu: encode_sparse finds other values\. Please "
    with pytest.warns(RuntimeWarning, match=wanted):
        assert verified.verdict(GPU).loop == loop
    assert verified.verdict(GPU).loop == loop  # without another warning, which would be an error
    on_gpu = SimpleNamespace(is_cuda=True, device=GPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "is_tensor", lambda values: True)
        assert backend.kernels_serve(on_gpu) == (loop is not None)


@pytest.mark.parametrize("mode", ["trust", "off", "check", "perhaps"])
def test_modes(mode: str, asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = asked(says(**NOTHING_WRONG))
    verified.verdict(GPU)
    verified.verdict.cache_clear()
    monkeypatch.setenv("STS_KERNELS", mode)
    if mode == "perhaps":
        with pytest.raises(InputError, match="STS_KERNELS is trust, check or off, not 'perhaps'"):
            verified.verdict(GPU)
        return
    assert verified.verdict(GPU).loop == (None if mode == "off" else "automatic")
    assert len(ran) == (2 if mode == "check" else 1)


def test_a_crash_is_told_and_remembered(asked: Any) -> None:
    crash = ["sys.stderr.write('an illegal memory access\\n')", "os._exit(134)"]
    ran = asked("\n".join([says(case="relu, bf16"), *crash]))
    with pytest.warns(RuntimeWarning, match="their check failed after relu, bf16: an illegal memory access"):
        assert verified.verdict(GPU).loop is None
    verified.verdict.cache_clear()
    with pytest.warns(RuntimeWarning, match="an illegal memory access"):
        verified.verdict(GPU)
    assert len(ran) == 1


def test_memory_that_others_hold_is_not_held_against_the_kernels(asked: Any) -> None:
    ran = asked("\n".join([says(case="relu"), "sys.exit('CUDA out of memory. Tried to allocate 2 MiB')"]))
    for n in (1, 2):
        with pytest.warns(RuntimeWarning, match="out of memory"):
            verified.verdict(GPU)
        verified.verdict.cache_clear()
        assert len(ran) == n


def test_a_hang_ends_with_all_its_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(verified, "CASE_SECONDS", 0.5)
    child = tmp_path / "child"
    lines = [
        says(case="topk, bf16x2"),
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])",
        f"open({str(child)!r}, 'w').write(str(child.pid))",
        "time.sleep(600)",
    ]
    assert verified.checked(command(*lines)).why == "their check did not go on after topk, bf16x2"
    number = int(child.read_text())
    for _ in range(100):
        with suppress(FileNotFoundError):
            if Path(f"/proc/{number}/stat").read_text().split()[2] != "Z":
                time.sleep(0.05)
                continue
        break
    with suppress(ProcessLookupError):
        os.kill(number, 0)
        assert Path(f"/proc/{number}/stat").read_text().split()[2] == "Z"


def test_a_check_that_prints_something_else() -> None:
    assert verified.checked(command("print('hello')")).why == "their check printed what is no JSON after its start"
    assert verified.checked(command("sys.exit(3)")).why == "their check failed after its start: exit code 3"


# ---- the cases themselves, on the emulated GPU


def few(monkeypatch: pytest.MonkeyPatch, *activations: str) -> None:
    monkeypatch.setattr(verified, "ACTIVATIONS", activations)
    monkeypatch.setattr(verified, "N_TOKENS", 70)
    monkeypatch.setattr(verified, "D_SAE", 300)


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "gated", "topk", "abstopk"])
def test_right_kernels_agree_with_torch(activation: str, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if gpu.type == "cpu":
        few(monkeypatch, activation)
        monkeypatch.setattr(verified, "PRECISIONS", verified.PRECISIONS if activation == "relu" else ("bf16x2",))
    *before, last = verified.cases(gpu)
    assert last == NOTHING_WRONG
    assert len(before) == 1 + 3 * len(verified.PRECISIONS) * len(verified.ACTIVATIONS)


@pytest.mark.parametrize(
    ("op", "result", "said"),
    [
        ("encode_sparse", 2, "encode_sparse finds other values"),
        ("accumulate_shift", "sum_base", "accumulate_shift gives another sum_base, off by"),
        ("accumulate_moments", "n_fired", "accumulate_moments gives another n_fired, off by 1 of"),
    ],
)
def test_wrong_kernels_are_found(op: str, result: Any, said: str, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch, "relu")
    real = getattr(cuda, op)

    def wrong(encoder: Any, *given: Any, **sums: Any) -> Any:
        found = real(encoder, *given, **sums)
        values = found[result] if found else sums[result]
        values[len(values) // 2] += 1 if values.dtype == torch.int64 else 0.01 * values.abs().max()
        return found

    monkeypatch.setattr(cuda, op, wrong)
    last = list(verified.cases(gpu))[-1]["verdict"]
    assert last["loop"] is None
    assert said in last["why"]
    assert last["why"].startswith("automatic loop, relu, bf16, rows of float32: ")
