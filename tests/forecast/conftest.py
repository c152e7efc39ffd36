"""A library of the tiny model's sets, which no test changes."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import LIBRARY_OPTIONS, Tiny

import sts_fast


@pytest.fixture(scope="session")
def library(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library") / "lib"
    sts_fast.profile(
        model=tiny.model, sae=tiny.saes["topk"], library=folder, trains={"sums": tiny.train, **tiny.domains},
        domains=tiny.domains, **LIBRARY_OPTIONS,
    )  # fmt: skip
    return folder
