"""Compiles the CUDA ops as plain C++ over an emulated GPU, so that their very source runs where there is none."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NAME = "_cuda_emulator"
OPTIONS = ("-x", "c++", "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas", "-Wno-psabi")
INCLUDED = tuple(f"-I{ROOT / place}" for place in ("tests/emulator", "csrc", "csrc/include"))


@cache
def load() -> Any:
    """The emulated _cuda module, compiled once per state of its sources; None where there is no C++ compiler."""
    library = build()
    if library is None:
        return None
    spec = importlib.util.spec_from_file_location(NAME, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_program(source: Path, program: Path) -> None:
    """Compiles a C++ program that uses the CUDA ops; `build` must have succeeded."""
    library = build()
    assert library is not None
    kernels = [library.parent / f"{unit.stem}.o" for unit in _kernels()]
    subprocess.run([_compiler(), *OPTIONS, *INCLUDED, "-c", source, "-o", program.with_suffix(".o")], check=True)
    subprocess.run([_compiler(), program.with_suffix(".o"), *kernels, "-o", program], check=True)


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def _kernels() -> list[Path]:
    return sorted((ROOT / "csrc/cuda").glob("*.cu"))


@cache
def build() -> Path | None:
    """The library of the emulated module, beside the object files of its units; None without a compiler."""
    compiler = _compiler()
    if compiler is None:
        return None
    import fcntl

    import pybind11

    units = [*_kernels(), ROOT / "csrc/bind_cuda.cpp"]
    digest = hashlib.sha256(sys.version.encode())
    for path in sorted([*(ROOT / "csrc").rglob("*.*"), *(ROOT / "tests/emulator").rglob("*.*")]):
        if path.suffix in (".h", ".cuh", ".cu", ".cpp"):
            digest.update(path.read_bytes())
    folder = ROOT / "build" / f"emulator-{digest.hexdigest()[:16]}"
    library = folder / f"{NAME}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the processes of one test run build it once
        if not library.exists():
            own = ["-DSTS_SM90A", f"-DSTS_CUDA_MODULE={NAME}"]
            own += [f"-I{place}" for place in (pybind11.get_include(), sysconfig.get_path("include"))]
            command = [compiler, *OPTIONS, *own, *INCLUDED]

            def compile_unit(unit: Path) -> Path:
                made = folder / f"{unit.stem}.o"
                subprocess.run([*command, "-c", str(unit), "-o", str(made)], check=True)
                return made

            with ThreadPoolExecutor(2) as pool:
                objects = list(pool.map(compile_unit, units))
            unfinished = folder / f"{os.getpid()}.so"
            subprocess.run([compiler, "-shared", *map(str, objects), "-o", str(unfinished)], check=True)
            unfinished.rename(library)
    return library
