"""examples/embed against the installed package, as another program embeds the core."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import emulator
import pytest
from native import LIB, ROOT, c_library, run, tool

EXAMPLES = ROOT / "examples" / "embed"

# x W + bias by hand, where it is positive: (1, 2) gives 1, 2 - 1, -1 and (3, 0) gives 3, -1, 3. With demonstrations
# (2, 2) gives 2, 1, 0 and (0, 1) gives 0, 0, -1: the squared shifts sum to 1 + 9, 0 and 0 + 9.
ACTIVE = "token 0: feature 0 = 1\ntoken 0: feature 1 = 1\ntoken 1: feature 0 = 3\ntoken 1: feature 2 = 3\n"
SHIFT = "shift: 10 0 9\n"


def configure(source: Path, build: Path, *options: str) -> None:
    tool("ninja")
    run(tool("cmake"), "-S", source, "-B", build, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", *options)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The examples of C++ and C, the latter under the sanitizers, which look into the library's memory too."""
    c_library()
    build = tmp_path_factory.mktemp("embed")
    cmakedir = run(sys.executable, "-m", "sts_fast", "--cmakedir").strip()
    configure(EXAMPLES, build, f"-Dsts_fast_DIR={cmakedir}", "-DCMAKE_C_FLAGS=-fsanitize=address,undefined")
    run("cmake", "--build", build)
    return build


def test_cpp(built: Path) -> None:
    assert run(built / "embed_cpp") == ACTIVE + SHIFT


def test_c_under_the_sanitizers(built: Path) -> None:
    assert run(built / "embed_c") == ACTIVE + SHIFT


def test_ctypes() -> None:
    assert run(sys.executable, EXAMPLES / "embed.py", c_library()) == ACTIVE


def test_rust(tmp_path: Path) -> None:
    program = tmp_path / "embed_rs"
    link = f"link-args={c_library()} -Wl,-rpath,{LIB}"
    run(tool("rustc"), EXAMPLES / "embed.rs", "-o", program, "-C", link)
    assert run(program) == ACTIVE


def test_cuda_on_an_emulated_gpu(tmp_path: Path) -> None:
    if emulator.build() is None:
        pytest.skip("no C++ compiler to build the emulator with")
    emulator.build_program(EXAMPLES / "embed_cuda.cpp", tmp_path / "embed_cuda")
    assert run(tmp_path / "embed_cuda") == SHIFT


def test_as_part_of_another_project_it_needs_no_python_and_installs_nothing(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.21)\nproject(other LANGUAGES CXX)\n"
        f'add_subdirectory("{ROOT.as_posix()}" sts_fast)\n'
        f'add_executable(embed "{(EXAMPLES / "embed.cpp").as_posix()}")\n'
        "target_link_libraries(embed PRIVATE sts::cpu)\n"
    )
    absent = [f"-DCMAKE_DISABLE_FIND_PACKAGE_{name}=ON" for name in ("Python", "Python3", "pybind11")]
    configure(project, tmp_path / "build", *absent)
    rules = (tmp_path / "build" / "build.ninja").read_text()
    assert "build embed" in rules
    assert "libsts_cpu.a" in rules or os.name == "nt"
    assert not [name for name in ("_cpu.cpython", "sts_c.so", "core_test") if name in rules]
    run("cmake", "--install", tmp_path / "build", "--prefix", tmp_path / "prefix")
    assert not (tmp_path / "prefix").exists()
