"""What the compiled CUDA module is made of, as far as that can be seen without a GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RELEASED = os.environ.get("STS_TEST_CUDA") == "released"
"""Whether the module must be there, and as a wheel holds it."""
ALL_ARCHITECTURES = {"sm_80", "sm_90a", "sm_100", "sm_120"}


@pytest.fixture(scope="module")
def library() -> Path:
    spec = find_spec("sts_fast.ops._cuda")
    if spec is None or spec.origin is None:
        assert not RELEASED, "the CUDA module was not built"
        pytest.skip("built without the CUDA module: make CUDA=AUTO install")
    return Path(spec.origin)


@cache
def cuobjdump(library: Path, *options: str) -> str:
    folders = sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob("*/bin"))
    places = os.pathsep.join([*map(str, folders), os.environ.get("PATH", "")])
    tool = shutil.which("cuobjdump", path=places)
    if tool is None:
        pytest.skip("no cuobjdump")
    ran = subprocess.run(
        [tool, *options, str(library)], capture_output=True, text=True, check=True, env=os.environ | {"PATH": places}
    )
    return ran.stdout


def architectures(library: Path) -> set[str]:
    return set(re.findall(r"\.(sm_\w+)\.cubin", cuobjdump(library, "--list-elf")))


def test_loads_without_a_driver_and_says_why_it_cannot_serve(library: Path) -> None:
    program = "from sts_fast.ops import _cuda; print(_cuda.missing_reason())"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd="/")
    if shutil.which("nvidia-smi") is None:
        assert re.fullmatch(r"no CUDA device can be used: .+\n", ran.stdout)


def test_machine_code_for_every_gpu_in_less_than_five_megabytes(library: Path) -> None:
    built = architectures(library)
    if not RELEASED and built != ALL_ARCHITECTURES:
        pytest.skip(f"built for {', '.join(sorted(built))} alone")
    assert built == ALL_ARCHITECTURES
    assert re.search(r"\.sm_80\.ptx", cuobjdump(library, "--list-ptx")), "PTX for GPUs to come"
    assert library.stat().st_size < 5e6


def test_kernels_keep_their_registers(library: Path) -> None:
    usage = re.findall(r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+)", cuobjdump(library, "--dump-resource-usage"))
    assert len(usage) >= 20
    in_memory = {name: int(stack) for name, _, stack in usage if int(stack) > 0}
    assert not [name for name in in_memory if "sm90" in name]
    # Of the loop for other GPUs a few kernels keep two registers elsewhere, between tiles.
    assert max(in_memory.values(), default=0) <= 8
    assert len(in_memory) <= 0.05 * len(usage)


def test_products_run_on_tensor_cores(library: Path) -> None:
    for architecture in architectures(library):
        listing = cuobjdump(library, "-sass", "-arch", architecture)
        kernels = dict(re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", listing, re.DOTALL))
        loops = {name: code for name, code in kernels.items() if "gemm_sm80" in name}
        assert loops
        for name, code in loops.items():
            assert code.count("HMMA.16816.F32.BF16") >= 64, (architecture, name)
        if architecture == "sm_90a":
            hopper = {name: code for name, code in kernels.items() if "sm90" in name and "gemm" in name}
            assert hopper
            for name, code in hopper.items():
                assert {"HGMMA.64x256x16.F32.BF16", "UTMALDG.2D.MULTICAST"} <= set(re.findall(r"[A-Z][\w.]+", code)), (
                    name
                )
