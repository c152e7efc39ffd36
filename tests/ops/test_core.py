"""The core as machine code: on an emulated ARM machine, and as the compiler made its inner loops."""

from __future__ import annotations

import platform
import re
import shutil

import pytest
from native import PATH, ROOT, run

from sts_fast.ops import _cpu

CROSS_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


@pytest.mark.skipif(
    not all(shutil.which(tool, path=PATH) for tool in (CROSS_COMPILER, EMULATOR, "cmake", "ninja")),
    reason=f"needs {CROSS_COMPILER} and {EMULATOR} to emulate an ARM machine, cmake and ninja to build for it",
)
def test_on_arm() -> None:
    build = ROOT / "build" / "aarch64"
    run(
        *("cmake", "-S", ROOT, "-B", build, "-G", "Ninja", "-DSTS_CORE_TEST=ON", "-DSTS_WERROR=ON"),
        *("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={CROSS_COMPILER}"),
        "-DCMAKE_EXE_LINKER_FLAGS=-static",
    )
    run("cmake", "--build", build, "--target", "core_test")
    assert "\n0 of " in run(EMULATOR, build / "core_test")


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="reads x86-64 machine code")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
@pytest.mark.parametrize(("register", "n_sums"), [("zmm", 24), ("ymm", 12)], ids=["avx512", "avx2"])
def test_the_product_keeps_its_sums_in_registers(register: str, n_sums: int) -> None:
    loops = [loop for loop in inner_loops(_cpu.__file__) if fused(loop, register) >= n_sums]
    assert loops, f"no loop with {n_sums} fused multiply-adds on {register}"
    for loop in loops:
        assert fused(loop, register) % n_sums == 0
        assert not [line for line in loop if "(%rsp" in line or "(%rbp" in line], "a register was spilled"


def fused(loop: list[str], register: str) -> int:
    return sum(bool(re.match(rf"vfn?madd\d+ps .*%{register}", line)) for line in loop)


def inner_loops(library: str) -> list[list[str]]:
    """The instructions from the target of each short backward jump to the jump."""
    code = []
    for line in run("objdump", "-d", "--no-show-raw-insn", library).splitlines():
        if match := re.match(r"\s*([0-9a-f]+):\s+(.*)", line):
            code.append((int(match[1], 16), match[2]))
    place = {address: i for i, (address, _) in enumerate(code)}
    loops = []
    for i, (address, instruction) in enumerate(code):
        match = re.match(r"j\w+\s+([0-9a-f]+)", instruction)
        target = int(match[1], 16) if match else address
        if target < address and target in place and i - place[target] < 400:
            body = [line for _, line in code[place[target] : i]]
            # A loop around another one is not an inner loop.
            if not any(line.startswith("j") for line in body):
                loops.append(body)
    return loops


@pytest.mark.parametrize("name", ["avx512", "avx2", "portable"])
def test_instruction_set_is_here(name: str) -> None:
    before = _cpu.instruction_set()
    try:
        _cpu.set_instruction_set(name)
    except ValueError:
        pytest.skip(f"this machine has no {name}: its kernels are compiled here, not run")
    finally:
        _cpu.set_instruction_set(before)
