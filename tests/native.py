"""Compilers and other tools, and the C++ package that was installed with the Python package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sts_fast.ops import _cpu

ROOT = Path(__file__).parents[1]
LIB = Path(_cpu.__file__).parents[1] / "lib"
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env={**os.environ, "PATH": PATH})
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


def tool(name: str) -> str:
    found = shutil.which(name, path=PATH)
    if not found:
        pytest.skip(f"needs {name}")
    return found


def c_library() -> Path:
    """sts_c, as a program finds it at run time; skips where the sources are tested without an installation."""
    if not LIB.is_dir() and ROOT in LIB.parents:
        pytest.skip("the package is not installed")
    (library,) = (path for path in LIB.iterdir() if "sts_c." in path.name and path.suffix not in (".a", ".lib"))
    return library
