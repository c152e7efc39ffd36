"""Builds the source distribution and, from it, wheels for Linux: python wheels/linux.py --output dist

One machine makes the wheels of all processors, with zig's clang and no container. A released wheel is built by
.github/workflows/wheels.yml instead, with the compiler of its platform.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from pathlib import Path

import ziglang

ROOT = Path(__file__).parents[1]
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]
ARCHITECTURES = ["x86_64", "aarch64"]
GLIBC = 28  # 2.28, of RHEL 8 and Debian 10
LARGEST = 6 << 20  # bytes of one wheel
BIN = Path(sysconfig.get_path("scripts"))


def run(*command: str | Path, **variables: str) -> None:
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")


def find(python: str) -> str | None:
    """Where that version is, or is put by uv; None where it is not to be had."""
    if "/" in python:
        return python
    for options in (["--no-python-downloads"], []):
        found = subprocess.run(
            [BIN / "uv", "python", "find", "--no-project", *options, f"cpython=={python}.*"],
            capture_output=True,
            text=True,
        )
        if found.returncode == 0:
            return found.stdout.strip()
    return None


def unpack(sdist: Path) -> Path:
    """Always the same folder: then zig knows what it has compiled, and all Pythons share the core's object files."""
    source = ROOT / "build" / "wheels" / "source"
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    run("tar", "-xzf", sdist, "-C", source, "--strip-components=1")
    return source


def build(source: Path, python: str, architecture: str, output: Path) -> Path:
    """The wheel of one Python for one processor, with the tag of the oldest glibc that it runs with."""
    program = "import sys; print('cpython-{}{}'.format(*sys.version_info))"
    abi = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
    suffix = f".{abi}-{architecture}-linux-gnu.so"
    with tempfile.TemporaryDirectory() as folder:
        run(
            *(BIN / "uv", "build", "--wheel", "--python", python, "--out-dir", folder, source),
            *("-C", "install.strip=false", "-C", f"build-dir={source}/build"),
            *(
                "-C",
                f"cmake.define.PYTHON_MODULE_EXTENSION={suffix}",
                "-C",
                "cmake.define.PYTHON_MODULE_DEBUG_POSTFIX=",
            ),
            *("-C", "cmake.define.STS_WERROR=ON", "-C", f"cmake.define.CMAKE_TOOLCHAIN_FILE={ROOT}/wheels/zig.cmake"),
            STS_ZIG=str(Path(ziglang.__file__).parent / "zig"),
            STS_ARCH=architecture,
            _PYTHON_HOST_PLATFORM=f"linux-{architecture}",
        )
        (made,) = Path(folder).glob("*.whl")
        # It names the oldest glibc that has all that the wheel needs, and refuses other libraries.
        run(
            *(BIN / "auditwheel", "repair", "--plat", "auto", "--wheel-dir", f"{folder}/audited", made),
            PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}",
        )
        (audited,) = Path(folder, "audited").glob("*.whl")
        if f"sts_fast/ops/_cpu{suffix}" not in zipfile.ZipFile(audited).namelist():
            sys.exit(f"{audited.name} has no module that its Python would find")
        glibc = re.search(rf"-manylinux_2_(\d+)_{architecture}\.", audited.name)
        if glibc is None or int(glibc[1]) > GLIBC:
            sys.exit(f"{audited.name} does not run with glibc 2.{GLIBC}")
        return Path(shutil.copy(audited, output))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "dist")
    parser.add_argument("--python", action="append", help="a version or a path; repeatable")
    parser.add_argument("--architecture", action="append", choices=ARCHITECTURES, help="repeatable")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    run(BIN / "uv", "build", "--sdist", "--out-dir", options.output, ROOT)
    sdist = max(options.output.glob("*.tar.gz"), key=os.path.getmtime)
    source = unpack(sdist)
    print(f"{sdist.name}  {sdist.stat().st_size / 1e6:.1f} MB")
    absent = []
    for version in options.python or PYTHONS:
        python = find(version)
        if python is None:
            absent.append(version)
            continue
        for architecture in options.architecture or ARCHITECTURES:
            shutil.rmtree(source / "build", ignore_errors=True)
            start = time.monotonic()
            wheel = build(source, python, architecture, options.output)
            size = wheel.stat().st_size
            print(f"{wheel.name}  {size / 1e6:.1f} MB, {time.monotonic() - start:.0f} s", flush=True)
            if size > LARGEST:
                sys.exit(f"{wheel.name} is larger than {LARGEST / 1e6:.1f} MB")
    if absent:
        sys.exit(f"no wheel of Python {', '.join(absent)}, which is not on this machine: pass --python PATH")


if __name__ == "__main__":
    main()
