"""Installs wheels as a user does and uses them: python wheels/check.py dist/*.whl

Each goes into a fresh environment whose PATH has no compiler. Wheels of other processors, and of Pythons that are not
here, are named and left out.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from linux import BIN, ROOT, find

TESTS = ["tests/ops", "tests/test_embed.py"]


def check(wheel: Path, python: str, lowest: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        inside = Path(folder, "env", "bin")
        subprocess.run([BIN / "uv", "venv", "-q", "--python", python, inside.parent], check=True)
        install = [BIN / "uv", "pip", "install", "-q", "--python", inside / "python"]
        if lowest:
            subprocess.run([*install, "--resolution", "lowest-direct", "-r", ROOT / "pyproject.toml"], check=True)
        subprocess.run([*install, wheel, "pytest", "hypothesis"], check=True)
        variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        variables |= {"PATH": str(inside), "HF_HUB_OFFLINE": "1"}
        for program, *words in (
            ["sts-fast", "doctor"],
            ["python", "-m", "pytest", "-q", *TESTS],
            ["sts-fast", "demo", "--output", f"{folder}/demo"],
        ):
            start = time.monotonic()
            done = subprocess.run([inside / program, *words], env=variables, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{done.stdout}{done.stderr}{wheel.name}: {program} {' '.join(words)} failed")
            passed = done.stdout.strip().rpartition("\n")[2] if "pytest" in words else ""
            print(f"  {program} {' '.join(words[:2])}: {time.monotonic() - start:.0f} s  {passed}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path, nargs="+")
    parser.add_argument("--lowest", action="store_true", help="with the oldest dependencies that pyproject.toml allows")
    options = parser.parse_args()
    for wheel in options.wheels:
        tag = wheel.name.split("-")[2]
        version = f"{tag[2]}.{tag[3:]}"
        python = find(version)
        if not wheel.stem.endswith(platform.machine()):
            print(f"{wheel.name}: not run, for another processor")
        elif python is None:
            print(f"{wheel.name}: not run, there is no Python {version} here")
        else:
            print(wheel.name, flush=True)
            check(wheel.resolve(), python, options.lowest)


if __name__ == "__main__":
    main()
