"""The notebooks of examples/, run again: they show what they would show today."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(path.name for path in (ROOT / "examples").glob("*.ipynb"))
NUMBER = re.compile(r"-?\d+\.\d+")
LARGEST = 100_000  # bytes


@pytest.fixture(scope="module")
def again(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("notebooks")
    command = [sys.executable, "-m", "docs.site.notebooks", str(folder)]
    env = {**os.environ, "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return folder


def shown(path: Path) -> list[str]:
    """The text of all outputs, in order."""
    outputs: list[dict[str, Any]] = [
        output for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] for output in cell.get("outputs", [])
    ]
    return ["".join(output.get("text") or output["data"]["text/plain"]) for output in outputs]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_shows_what_it_shows_today(again: Path, name: str) -> None:
    """Numbers with a fraction may differ a little between processors; all other text is the same."""
    assert (ROOT / "examples" / name).stat().st_size < LARGEST
    for new, old in zip(shown(again / name), shown(ROOT / "examples" / name), strict=True):
        assert NUMBER.sub("#", new).split() == NUMBER.sub("#", old).split()
        numbers = [[float(number) for number in NUMBER.findall(text)] for text in (new, old)]
        assert numbers[0] == pytest.approx(numbers[1], rel=0.05, abs=0.05)
